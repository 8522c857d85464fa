"""Bounds on how an iMLP's map contracts, from the spectral norms of its weights and the slope of its activation.

With p_k = s^2 |V_k| |W_k| for the coupling k of H - 1, where s bounds the slope of the activation, the map of the
nested solves has the Lipschitz constant L_1 or less, where

    L_k = p_k / (1 - L_{k+1}),    L_{H-1} = p_{H-1},

as long as all L_k are below 1: (1 - F_{k+1})^{-1} has the Lipschitz constant 1 / (1 - L_{k+1}) or less. Each step of an
inner Picard iteration adds a power of L_{k+1}, so that the bound also holds for any fixed number of inner steps.
"""

import math
from collections.abc import Sequence

import torch


def nested_bound(up: Sequence[float], down: Sequence[float], slope: float) -> float:
    """The bound L_1 on the Lipschitz constant of the map of nested solves; inf where there is none.

    Args:
        up: Spectral norms of W_1, W_2, ...
        down: Of V_1, V_2, ...
        slope: The activation's Lipschitz constant s.
    """
    bound = 0.0
    for w, v in zip(reversed(up), reversed(down), strict=True):
        bound = slope**2 * v * w / (1 - bound) if bound < 1 else math.inf
    return bound


def joint_bound(up: Sequence[float], down: Sequence[float], slope: float) -> float:
    """The bound on the Lipschitz constant of the map of all hidden layers, in the norm of its whole state.

    The map goes from the layers 1, 3, ... to 2, 4, ... and back. Each way, the norm of what a layer changes by is at
    most the sum over its neighbours of s |weight| times what they change by; so the spectral norm of the product of
    these two matrices, of nonnegative numbers, bounds the whole.

    Args:
        up: As in :func:`nested_bound`.
        down: As in :func:`nested_bound`.
        slope: As in :func:`nested_bound`.
    """
    upwards, downwards = (torch.tensor(norms, dtype=torch.float64) for norms in (up, down))
    influence = slope * (upwards.diag(-1) + downwards.diag(1))  # (H, H)
    there, back = influence[1::2, ::2], influence[::2, 1::2]
    return float(torch.linalg.matrix_norm(back @ there, 2))


def layer_bound(coeff: float, slope: float, hidden_layers: int) -> float:
    """The bound on every spectral norm with which both maps contract by ``coeff`` or a smaller factor.

    c = sqrt(coeff) / (2 s cos(pi / (H + 1))): the matrix of :func:`joint_bound` over all layers is s c times the
    adjacency matrix of a path of H nodes, whose norm is 2 cos(pi / (H + 1)), so the joint map's bound is coeff. That of
    the nested one, as a function of p = (s c)^2, is convex, 0 at p = 0 and 1 where the joint one is, hence below it.
    """
    return math.sqrt(coeff) / (2 * slope * math.cos(math.pi / (hidden_layers + 1)))
