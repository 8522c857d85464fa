"""Stabilized bi-conjugate gradients."""

import dataclasses

import torch
from torch import Tensor

from solvers.linear.krylov import CycleLimits, KrylovSolver
from solvers.linear.operator import FlatMatvec
from solvers.problem.norms import inner, relative, rms_norm
from solvers.problem.small_systems import inverse_or_zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiCGStab(KrylovSolver):
    """BiCGStab: short recurrences for any invertible A, in a fixed amount of memory.

    A step costs two products with A and six vectors of the state's size in all, however many steps are taken: prefer
    it to :class:`GMRES` when the basis would not fit. It needs no transpose. The residual may rise on its way, and a
    step may break down (an inner product near zero), whereupon that sample starts a new cycle from its true residual.

    Args:
        max_steps: Most steps in all.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None means
            a tenth of the relative tolerance of the solve whose derivative is computed, and ``eps ** 0.75`` of the
            dtype in a linear solve by itself or after a solve without a relative tolerance.
        atol: Absolute tolerance.
        preconditioner: The product with an estimate of the inverse of A, of something like the state to something like
            the state. It is applied from the right, so that the residual stays that of the system.

    References:
        van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of nonsymmetric
        linear systems", SIAM J. Sci. Stat. Comput. 13 (1992).
    """

    def cycle(
        self, matvec: FlatMatvec, r: Tensor, limits: CycleLimits, history: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = torch.finfo(r.dtype).eps
        shadow, p, x = r, r, torch.zeros_like(r)
        rho = inner(shadow, r)  # (B, 1)
        running = rho > 0
        broken = torch.zeros_like(running)
        steps = torch.zeros_like(running, dtype=torch.int64)
        for _ in range(limits.most):
            steps = steps + running
            direction = self.preconditioned(p)
            v = matvec(direction)
            slope = inner(shadow, v)
            alpha = rho * inverse_or_zero(slope, eps * _norm(shadow) * _norm(v))
            s = r - alpha * v
            correction = self.preconditioned(s)
            t = matvec(correction)
            # The minimum of |s - omega t|; where s is zero, so is t, and omega does not matter.
            omega = inner(t, s) * inverse_or_zero(inner(t, t), 0.0)
            x = torch.where(running, x + alpha * direction + omega * correction, x)
            r = torch.where(running, s - omega * t, r)
            error = rms_norm(r)
            history.append(relative(error, limits.norm_b))

            rho_next = inner(shadow, r)
            short = running & limits.short(error).unsqueeze(1)
            # Zero factors, or a residual orthogonal to the shadow: no direction is left in this cycle.
            stuck = (alpha == 0) | (omega == 0) | (rho_next.abs() <= eps * _norm(shadow) * _norm(r))
            broken = broken | (short & (alpha == 0) & (omega == 0))
            running = short & ~stuck & (steps < limits.left.unsqueeze(1))
            if not bool(running.any()):
                break
            beta = rho_next * alpha * inverse_or_zero(rho * omega, 0.0)
            p = torch.where(running, r + beta * (p - omega * v), 0.0)
            rho = rho_next
        return x, broken.squeeze(1), steps.squeeze(1)


def _norm(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm
