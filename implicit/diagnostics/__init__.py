"""Tools to inspect implicit layers: a model while it runs, a map before it is solved, and what is wrong with either."""

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.diagnosis import Diagnosis
from implicit.diagnostics.doctor import diagnose
from implicit.diagnostics.gradient_audit import USES, GradientAudit, audit_gradients
from implicit.diagnostics.layer_report import Finding, LayerReport, Proposal
from implicit.diagnostics.map_check import check_map, checked_maps
from implicit.diagnostics.on_its_way import OnItsWay
from implicit.diagnostics.recording import record_solutions
from implicit.diagnostics.solve_monitor import SolveMonitor, SolveStatistics, monitor_solves
from implicit.diagnostics.spectral_radius import SpectralRadius, spectral_radius

__all__ = [
    "Cause",
    "Diagnosis",
    "Finding",
    "GradientAudit",
    "LayerReport",
    "OnItsWay",
    "Proposal",
    "SolveMonitor",
    "SolveStatistics",
    "SpectralRadius",
    "USES",
    "audit_gradients",
    "check_map",
    "checked_maps",
    "diagnose",
    "monitor_solves",
    "record_solutions",
    "spectral_radius",
]
