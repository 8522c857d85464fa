"""Bounds on the spectral norms of layers and on the Lipschitz constants that follow from them."""

from implicit.spectral.lipschitz import lipschitz_bound
from implicit.spectral.parametrization import SpectralNorm
from implicit.spectral.power_iteration import power_iterations_advanced
from implicit.spectral.spectral_norm import spectral_norm

__all__ = ["SpectralNorm", "lipschitz_bound", "power_iterations_advanced", "spectral_norm"]
