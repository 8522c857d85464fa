"""Restarted GMRES."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers.linear.krylov import CycleLimits, KrylovSolver
from solvers.linear.operator import FlatMatvec
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import relative
from solvers.problem.small_systems import back_substitute, inverse_or_zero
from solvers.problem.window import combine, dot, store


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(KrylovSolver):
    """Restarted GMRES: minimizes ``|b - A x|`` over the Krylov space of A and b, for any invertible A.

    A step costs one product with A and work with the basis that grows by one vector a step, up to ``restart`` of them.
    The true residual is computed once a cycle (one more product), so that the status and the residual do not rest on
    the recurrence. Orthogonalization is classical Gram-Schmidt applied twice, which is as accurate as Householder
    and two batched matrix products. (Differences from Saad and Schultz: that orthogonalization; a sample whose Krylov
    space is exhausted leaves the others running.)

    Args:
        max_steps: Most steps in all.
        restart: Steps after which the basis is dropped and rebuilt from the residual.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None means
            a tenth of the relative tolerance of the solve whose derivative is computed, and ``eps ** 0.75`` of the
            dtype in a linear solve by itself or after a solve without a relative tolerance.
        atol: Absolute tolerance.
        preconditioner: The product with an estimate of the inverse of A, of something like the state to something like
            the state. It is applied from the right, so that the residual stays that of the system.

    References:
        Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems",
        SIAM J. Sci. Stat. Comput. 7 (1986), algorithm 4.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int(self, "restart", self.restart)

    def cycle(
        self, matvec: FlatMatvec, r: Tensor, limits: CycleLimits, history: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = min(self.restart, limits.most)
        rounding = 20 * torch.finfo(r.dtype).eps
        to_rms = 1.0 / math.sqrt(max(r.shape[1], 1))
        beta = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # (B, 1)
        basis = store(None, 0, r * inverse_or_zero(beta, 0.0), size + 1)
        # The product of the Givens rotations so far, applied to every new column of the Hessenberg matrix at once.
        # It grows with the basis: few steps are the rule, and with thousands of samples the full square is large.
        rotation = _identities(r, min(size, 7) + 1)
        columns: list[Tensor] = []
        norm_a = torch.zeros_like(beta)  # the largest |A v| of a unit vector v so far
        running = beta.squeeze(1) > 0
        exhausted = torch.zeros_like(running)
        steps = torch.zeros_like(running, dtype=torch.int64)
        for j in range(size):
            if j + 1 == rotation.shape[1]:
                grown = _identities(r, min(size, 2 * j) + 1)
                grown[:, : j + 1, : j + 1] = rotation
                rotation = grown
            w = matvec(self.preconditioned(basis[:, j]))
            norm_a = torch.maximum(norm_a, torch.linalg.vector_norm(w, dim=1, keepdim=True))
            used = basis[:, : j + 1]
            h = dot(used, w)  # (B, j + 1)
            w = w - combine(used, h)
            again = dot(used, w)
            w = w - combine(used, again)
            h = h + again
            below = torch.linalg.vector_norm(w, dim=1, keepdim=True)  # (B, 1)
            # w in the span of the basis to rounding: the Krylov space is exhausted.
            invariant = (below <= rounding * norm_a).squeeze(1)
            below = torch.where(invariant.unsqueeze(1), 0.0, below)

            rotated = dot(rotation[:, : j + 1, : j + 1], h)  # (B, j + 1)
            pivot = torch.hypot(rotated[:, j:], below)
            unit = inverse_or_zero(pivot, rounding * norm_a)
            # An unusable pivot: keep the rotation orthogonal, leave the unknown at 0.
            cos = torch.where(unit > 0, rotated[:, j:] * unit, 1.0)
            sin = below * unit
            upper, lower = rotation[:, j].clone(), rotation[:, j + 1].clone()
            rotation[:, j] = cos * upper + sin * lower
            rotation[:, j + 1] = cos * lower - sin * upper
            columns.append(torch.cat((rotated[:, :j], torch.where(unit > 0, pivot, 0.0)), dim=1))

            steps = steps + running
            estimate = (beta.squeeze(1) * rotation[:, j + 1, 0]).abs() * to_rms  # (B,)
            history.append(relative(estimate, limits.norm_b))
            exhausted = exhausted | (running & invariant & (unit.squeeze(1) == 0))
            running = running & limits.goes_on(estimate, steps) & ~invariant
            if not bool(running.any()):
                break
            # A stopped sample continues with a zero vector, whose column and unknown are zero.
            basis = store(basis, j + 1, w * inverse_or_zero(below, 0.0) * running.unsqueeze(1), size + 1)

        n = len(columns)
        rhs = beta * rotation[:, :n, 0]  # (B, n)
        rows = []
        for i in range(n):
            right = [columns[k][:, i] for k in range(i + 1, n)]
            row = torch.stack(right, dim=1) if right else rhs[:, :0]
            rows.append((inverse_or_zero(columns[i][:, i : i + 1], 0.0), row, rhs[:, i : i + 1]))
        return self.preconditioned(combine(basis[:, :n], back_substitute(rows))), exhausted, steps


def _identities(like: Tensor, size: int) -> Tensor:
    """(B, size, size), an identity matrix for each row of ``like`` (B, D)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)
