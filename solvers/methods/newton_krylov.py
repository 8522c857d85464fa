"""Inexact Newton's method with a Krylov linear solver."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers.linear import GMRES, LinearSolver
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem.norms import rms_norm

# Eisenstat and Walker's choice 2: gamma, alpha, and the largest forcing term.
_GAMMA, _ALPHA, _LARGEST_FORCING = 0.9, 2.0, 0.9

# Armijo's constant: a step must reduce the residual by this part of its length at least.
_SUFFICIENT = 1e-4
_MOST_HALVINGS = 10


@dataclasses.dataclass
class NewtonKrylovState(State):
    """The iterate and how exactly the next linear system is to be solved.

    Attributes:
        error: (B,) root mean square of ``g = f(z) - z``.
        forcing: (B,) relative tolerance of the next linear solve.
    """

    error: Tensor
    forcing: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method on ``z - f(z) = 0``, its linear systems solved by a Krylov method to a forcing term.

    With g = f(z) - z and J = df/dz, in each step

        |(I - J) s - g| <= eta |g|,    z <- z + t s,

    where t = 1, 1/2, 1/4 ... is the first length, sample by sample, with |g(z + t s)| <= (1 - 1e-4 t) |g|. Converges
    quadratically near a regular solution, also where ``f`` expands; each step costs a call of ``f``, one more a halving
    of t, and a product J v, by forward mode, for every step of the linear solver, all of which count as calls of
    ``f``. Worth it where the other solvers crawl or fail.

    Gradients do not flow through its steps: use it with the implicit backward mode, not with the unrolled one.

    Args:
        linear_solver: The solver of the linear systems. Its own tolerances are not used; its limits are.
        forcing: eta, the relative accuracy of the linear solves; None chooses it step by step by Eisenstat and Walker's
            choice 2, loosely at first and tightly near the solution. A map known to be linear needs one step with a
            small eta.

    References:
        Dembo, Eisenstat and Steihaug, "Inexact Newton methods", SIAM J. Numer. Anal. 19 (1982).
        Eisenstat and Walker, "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17 (1996),
        equation (2.6) with its safeguard.
    """

    differentiable: ClassVar[bool] = False

    linear_solver: LinearSolver = GMRES(restart=20, max_steps=40)
    forcing: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(
                "NewtonKrylov(linear_solver=...) must be a linear solver such as solvers.linear.GMRES(), got "
                f"{self.linear_solver!r}."
            )
        if self.forcing is not None and not 0 < self.forcing < 1:
            raise ValueError(f"NewtonKrylov(forcing=...) must be in (0, 1) or None, got {self.forcing!r}.")

    def init(self, f: FlatMapping, z0: Tensor) -> NewtonKrylovState:
        z0 = z0.contiguous()  # forward mode refuses expanded tensors
        fz = f(z0)
        error = rms_norm(fz - z0)
        return NewtonKrylovState(z=z0, fz=fz, error=error, forcing=torch.full_like(error, self.forcing or 0.5))

    def step(self, f: FlatMapping, state: NewtonKrylovState) -> NewtonKrylovState:
        return self.step_some(f, state, torch.ones_like(state.error, dtype=torch.bool), state.z)

    @torch.no_grad()
    def step_some(self, f: FlatMapping, state: NewtonKrylovState, rows: Tensor, others: Tensor) -> NewtonKrylovState:
        """A step of the samples ``rows`` (B,) alone; the others go to their rows of ``others`` (B, D)."""

        def product(v: Tensor) -> Tensor:
            return v - _jvp(f, state.z, v)

        g = torch.where(rows.unsqueeze(1), state.fz - state.z, 0.0)
        tolerance = torch.where(rows, state.forcing * state.error, 0.0)
        s = self.linear_solver.run(product, g, tolerance=tolerance).x
        # A linear solve that found nothing leaves a Picard step.
        usable = s.isfinite().all(dim=1) & s.any(dim=1)
        s = torch.where(usable.unsqueeze(1), s, g)

        length = torch.ones_like(state.error)
        z = torch.where(rows.unsqueeze(1), state.z + s, others)
        fz = f(z)
        error = rms_norm(fz - z)
        for _ in range(_MOST_HALVINGS):
            # Not accepted also where the error is nan.
            rejected = rows & ~(error <= (1 - _SUFFICIENT * length) * state.error)
            if not bool(rejected.any()):
                break
            length = torch.where(rejected, length / 2, length)
            z = torch.where(rejected.unsqueeze(1), state.z + length.unsqueeze(1) * s, z)
            # Accepted samples come with the same z, and out with the same image.
            fz = torch.where(rejected.unsqueeze(1), f(z), fz)
            error = torch.where(rejected, rms_norm(fz - z), error)
        return NewtonKrylovState(z=z, fz=fz, error=error, forcing=self._next_forcing(state, error))

    def _next_forcing(self, state: NewtonKrylovState, error: Tensor) -> Tensor:
        if self.forcing is not None:
            return state.forcing
        wanted = _GAMMA * (error / state.error.clamp_min(torch.finfo(error.dtype).tiny)) ** _ALPHA
        # The safeguard: a forcing term that was large must not become small at once.
        floor = _GAMMA * state.forcing**_ALPHA
        wanted = torch.where(floor > 0.1, torch.maximum(wanted, floor), wanted)
        return torch.where(wanted.isfinite(), wanted, _LARGEST_FORCING).clamp(1e-6, _LARGEST_FORCING)


def _jvp(f: FlatMapping, z: Tensor, v: Tensor) -> Tensor:
    """The product of the Jacobian of ``f`` at z with v."""
    if not torch.is_inference_mode_enabled():
        product: Tensor = torch.func.jvp(f, (z,), (v,))[1]
        return product
    # In PyTorch 2.11 forward mode gives zeros under inference mode, without a word.
    with torch.inference_mode(False), torch.no_grad():
        return _jvp(f, z.clone(), v.clone())
