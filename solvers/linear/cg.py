"""Conjugate gradients, for symmetric positive definite systems and for normal equations."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers.linear.krylov import CycleLimits, KrylovSolver
from solvers.linear.operator import FlatMatvec, transpose
from solvers.problem.norms import inner, relative, rms_norm
from solvers.problem.small_systems import inverse_or_zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(KrylovSolver):
    """Conjugate gradients: minimizes the energy norm of the error, for a symmetric positive definite A.

    A step costs one product with A and four vectors of the state's size in all. Use it where A is known to be symmetric
    positive definite: the Hessian of a minimum (the condition of :func:`implicit.stationary`), or I - J of a symmetric
    contraction. A direction of curvature that is not positive proves that A is not: that sample ends as BREAKDOWN
    unless it has converged already. A that is negative definite is solved as -A, because only signs differ.

    Args:
        max_steps: Most steps in all.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None means
            a tenth of the relative tolerance of the solve whose derivative is computed, and ``eps ** 0.75`` of the
            dtype in a linear solve by itself or after a solve without a relative tolerance.
        atol: Absolute tolerance.
        preconditioner: The product with a symmetric positive definite estimate of the inverse of A; of something like
            the state to something like the state.

    References:
        Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Nat. Bur. Standards
        49 (1952).
    """

    on_breakdown: ClassVar[str] = (
        " With CG it may also mean that the operator, or the preconditioner, is not symmetric positive definite: use "
        '"gmres", "normal_cg" or "dense" for such an operator.'
    )

    def cycle(
        self, matvec: FlatMatvec, r: Tensor, limits: CycleLimits, history: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = torch.finfo(r.dtype).eps
        x, p = torch.zeros_like(r), torch.zeros_like(r)
        before = torch.zeros_like(limits.norm_b).unsqueeze(1)  # (B, 1)
        sign = torch.zeros_like(before)
        running = rms_norm(r).unsqueeze(1) > 0
        broken = torch.zeros_like(running)
        steps = torch.zeros_like(running, dtype=torch.int64)
        for _ in range(limits.most):
            z = self.preconditioned(r)
            rho = inner(r, z)
            p = z + rho * inverse_or_zero(before, 0.0) * p
            ap = matvec(p)
            curvature = inner(p, ap)
            size = torch.linalg.vector_norm(p, dim=1, keepdim=True) * torch.linalg.vector_norm(ap, dim=1, keepdim=True)
            sign = torch.where(sign == 0, curvature.sign(), sign)
            definite = (rho > 0) & (sign * curvature > eps * size)
            broken = broken | (running & ~definite)
            running = running & definite
            if not bool(running.any()):
                break
            steps = steps + running
            alpha = torch.where(running, rho * inverse_or_zero(curvature, 0.0), 0.0)
            x = torch.where(running, x + alpha * p, x)
            r = torch.where(running, r - alpha * ap, r)
            p = torch.where(running, p, 0.0)
            before = torch.where(running, rho, 0.0)
            error = rms_norm(r)
            history.append(relative(error, limits.norm_b))
            running = running & limits.goes_on(error, steps.squeeze(1)).unsqueeze(1)
            if not bool(running.any()):
                break
        return x, broken.squeeze(1), steps.squeeze(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG(KrylovSolver):
    """Conjugate gradients on the normal equations ``A' A x = A' b``, for any A; also called CGLS.

    Minimizes ``|b - A x|`` over a growing space, so that a singular A gets a least-squares solution (with the status
    BREAKDOWN where the residual is above the tolerance). A step costs a product with A and one with its transpose. The
    number of steps grows with the condition number of A instead of its square root as for :class:`CG`: prefer
    :class:`GMRES` where its basis fits in memory, unless A is near to orthogonal or singular.

    Args:
        max_steps: Most steps in all.
        rtol: As in :class:`CG`, as is the next.
        atol: Absolute tolerance.
        preconditioner: Refused: this method needs none of A, but one of A' A.

    References:
        Björck, "Numerical methods for least squares problems" (1996), algorithm 7.4.1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None:
            raise ValueError(
                "NormalCG takes no preconditioner, because its system is A' A x = A' b. Use GMRES or BiCGStab."
            )

    def cycle(
        self, matvec: FlatMatvec, r: Tensor, limits: CycleLimits, history: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = torch.finfo(r.dtype).eps
        rmatvec = transpose(matvec, r)
        x, p = torch.zeros_like(r), torch.zeros_like(r)
        before = torch.zeros_like(limits.norm_b).unsqueeze(1)  # (B, 1)
        largest = torch.zeros_like(before)  # of |A p| / |p|
        running = rms_norm(r).unsqueeze(1) > 0
        broken = torch.zeros_like(running)
        steps = torch.zeros_like(running, dtype=torch.int64)
        for _ in range(limits.most):
            gradient = rmatvec(r)
            gamma = inner(gradient, gradient)
            p = gradient + gamma * inverse_or_zero(before, 0.0) * p
            ap = matvec(p)
            length, image = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (p, ap))
            largest = torch.maximum(largest, image * inverse_or_zero(length, 0.0))
            # The residual is orthogonal to the range of A to rounding: a least-squares solution.
            size = torch.linalg.vector_norm(r, dim=1, keepdim=True)
            useful = (gamma.sqrt() > 10 * eps * largest * size) & (image > 0) & ap.isfinite().all(dim=1, keepdim=True)
            broken = broken | (running & ~useful)
            running = running & useful
            if not bool(running.any()):
                break
            steps = steps + running
            alpha = torch.where(running, gamma * inverse_or_zero(image**2, 0.0), 0.0)
            x = torch.where(running, x + alpha * p, x)
            r = torch.where(running, r - alpha * ap, r)
            p = torch.where(running, p, 0.0)
            before = torch.where(running, gamma, 0.0)
            error = rms_norm(r)
            history.append(relative(error, limits.norm_b))
            running = running & limits.goes_on(error, steps.squeeze(1)).unsqueeze(1)
            if not bool(running.any()):
                break
        return x, broken.squeeze(1), steps.squeeze(1)
