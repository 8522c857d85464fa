"""Implicit layers for PyTorch: any fixed-point map as a layer, with selectable solver and backward mode."""

from implicit._soft_norm import SpectralNorm
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
from implicit.diagnostics import check_map, checked_maps, record_solutions
from implicit.dropout import dropout_mask
from implicit.functional import fixed_point
from implicit.invertible_residual import ExactLogDet, InvertibleResidual, PowerSeriesLogDet
from implicit.iterates import iterates
from implicit.jacobian_regularization import jacobian_regularization
from implicit.layer import FixedPointLayer
from implicit.lipschitz import lipschitz_bound
from implicit.power_iteration import power_iterations_advanced
from implicit.spectral_norm import spectral_norm
from implicit.warm_start import WarmStart

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
    "check_map",
    "checked_maps",
    "dropout_mask",
    "fixed_point",
    "get_backward",
    "iterates",
    "jacobian_regularization",
    "lipschitz_bound",
    "power_iterations_advanced",
    "record_solutions",
    "spectral_norm",
]
