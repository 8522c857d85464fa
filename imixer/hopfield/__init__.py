"""Hierarchical Hopfield networks, the energy-based model that iMixer is derived from."""

from imixer.hopfield.lagrangians import GELU, CentredNorm, Identity, Lagrangian, ReLU, Softmax
from imixer.hopfield.network import HierarchicalHopfield
from imixer.hopfield.trajectory import Trajectory

__all__ = [
    "CentredNorm",
    "GELU",
    "HierarchicalHopfield",
    "Identity",
    "Lagrangian",
    "ReLU",
    "Softmax",
    "Trajectory",
]
