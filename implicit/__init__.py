"""Implicit layers for PyTorch: any fixed-point map as a layer, with selectable solver and backward mode."""

from implicit.backward import (
    JFB,
    SHINE,
    AutoBackward,
    Backward,
    Checkpointed,
    Implicit,
    Phantom,
    Unrolled,
    get_backward,
)
from implicit.diagnostics import (
    audit_gradients,
    check_map,
    checked_maps,
    diagnose,
    monitor_solves,
    record_solutions,
)
from implicit.differentiable import differentiable
from implicit.functional import fixed_point
from implicit.invertible_residual import InvertibleResidual
from implicit.layer import FixedPointLayer
from implicit.log_determinant import ExactLogDet, PowerSeriesLogDet
from implicit.optima import projected_gradient, proximal_gradient, stationary
from implicit.root import root
from implicit.spectral.lipschitz import lipschitz_bound
from implicit.spectral.parametrization import SpectralNorm
from implicit.spectral.power_iteration import power_iterations_advanced
from implicit.spectral.spectral_norm import spectral_norm
from implicit.training.dropout import dropout_mask
from implicit.training.iterates import iterates
from implicit.training.jacobian_regularization import jacobian_regularization
from implicit.training.warm_start import WarmStart

__all__ = [
    "AutoBackward",
    "Backward",
    "Checkpointed",
    "ExactLogDet",
    "FixedPointLayer",
    "Implicit",
    "InvertibleResidual",
    "JFB",
    "Phantom",
    "PowerSeriesLogDet",
    "SHINE",
    "SpectralNorm",
    "Unrolled",
    "WarmStart",
    "audit_gradients",
    "check_map",
    "checked_maps",
    "diagnose",
    "differentiable",
    "dropout_mask",
    "fixed_point",
    "get_backward",
    "iterates",
    "jacobian_regularization",
    "lipschitz_bound",
    "monitor_solves",
    "power_iterations_advanced",
    "projected_gradient",
    "proximal_gradient",
    "record_solutions",
    "root",
    "spectral_norm",
    "stationary",
]
