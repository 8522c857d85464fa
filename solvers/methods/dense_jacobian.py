"""The whole Jacobian of a map for samples of few unknowns, by one batched call of the map."""

import torch
from torch import Tensor

from solvers.methods.jacobian_product import JacobianProduct, Way, derivatives_allowed
from solvers.methods.solver import FlatMapping
from solvers.problem.forward_mode import FORWARD_MODE


def with_jacobian(f: FlatMapping, z: Tensor, way: Way = "forward mode") -> tuple[Tensor, Tensor, Way]:
    """``f(z)`` and its Jacobian at z, for (B, D) tensors whose rows are independent.

    By forward mode along all unit vectors at once, which is one call of ``f``; for one unknown, by one backward pass,
    which costs less. Where the map does not support that, column by column as :class:`JacobianProduct` does it.

    Args:
        f: The map.
        z: (B, D).
        way: The best way that has not failed yet.

    Returns:
        (B, D) ``f(z)``; (B, D, D) the Jacobian, whose last dimension is that of z; the way that worked.
    """
    size = z.shape[1]
    if way == "forward mode" and size:
        with derivatives_allowed(z) as z:
            try:
                if size == 1:
                    return *_with_slope(f, z), way
                units = torch.eye(size, dtype=z.dtype, device=z.device).unsqueeze(1).expand(size, *z.shape).contiguous()
                along = torch.func.vmap(
                    lambda v: torch.func.jvp(f, (z,), (v,)),
                    out_dims=(None, 2),  # type: ignore[arg-type]
                )
                with FORWARD_MODE:
                    fz, columns = along(units)[:2]
                return fz, columns.to(z.dtype), way
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError, ValueError):
                pass  # if it is the error of f itself, the next call raises it again
    fz = f(z)
    product = JacobianProduct(f, z, fz, way)
    return fz, product.matrix(), product.way


def by_reverse_mode(f: FlatMapping, z: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` (B, D) and its Jacobian (B, D, D), by one call of ``f`` and D backward passes at once.

    In a graph for all batch sizes, where forward mode fails (PyTorch 2.11 to 2.14).
    """
    size = z.shape[1]
    fz, pull = torch.func.vjp(f, z)[:2]
    if size == 1:
        return fz, pull(torch.ones_like(z))[0].to(z.dtype).unsqueeze(2)
    units = torch.eye(size, dtype=fz.dtype, device=z.device).unsqueeze(1).expand(size, *z.shape).contiguous()
    rows = torch.func.vmap(lambda v: pull(v)[0], out_dims=1)(units)
    return fz, rows.to(z.dtype)


def _with_slope(f: FlatMapping, z: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` and its Jacobian for one unknown: (B, 1) and (B, 1, 1)."""
    try:
        return by_reverse_mode(f, z)
    except (NotImplementedError, RuntimeError, ValueError):
        with FORWARD_MODE:
            fz, tangent = torch.func.jvp(f, (z,), (torch.ones_like(z),))[:2]
        return fz, tangent.to(z.dtype).unsqueeze(2)
