"""Tools to inspect implicit layers: a model while it runs, or a map before it is solved."""

from implicit.diagnostics.map_check import check_map, checked_maps
from implicit.diagnostics.recording import record_solutions
from implicit.diagnostics.spectral_radius import SpectralRadius, spectral_radius

__all__ = ["SpectralRadius", "check_map", "checked_maps", "record_solutions", "spectral_radius"]
