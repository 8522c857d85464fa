"""Inexact Newton's method with a Krylov linear solver."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers.linear import GMRES, LinearSolver
from solvers.methods.descent import SUFFICIENT, Point, backtrack
from solvers.methods.jacobian_product import JacobianProduct, Way
from solvers.methods.root_map import RootMap
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.methods.trust_region import DenseModel, descend
from solvers.problem.flat_map import FlatMap
from solvers.problem.norms import rms_norm
from solvers.problem.small_systems import inverse_or_zero

# Eisenstat and Walker's choice 2: gamma, alpha, and the largest forcing term.
_GAMMA, _ALPHA, _LARGEST_FORCING = 0.9, 2.0, 0.9
_FIRST_FORCING = 0.5

# The most unknowns with which the Jacobian is formed: it costs a product for each.
FEW_UNKNOWNS = 32

# The leaps of an excursion, in units of the iterate's size along Newton's step there, and the steps of each leg: a leap
# and the descent from where it leads. Together they end within the driver's patience, as few legs take all their steps.
_LEAPS = (1.0, -1.0, 4.0, -4.0, 0.25, -0.25)
_LEG = 8
_GIVEN_UP = (len(_LEAPS) + 1) * _LEG


@dataclasses.dataclass
class NewtonKrylovState(State):
    """The iterate, how exactly the next linear system is solved, and how far the next step may go.

    Attributes:
        g: (B, D) ``f(z) - z``.
        error: (B,) its root mean square.
        forcing: (B,) relative tolerance of the next linear solve.
        radius: (B,) the trust region's radius; infinite for a sample that needs none.
        excursion: (B,) int64, 0 for a sample that descends. For one that found no smaller residual nearby and searches
            elsewhere, ``leg * _LEG + step`` with leg from 1 and step from 0; ``_GIVEN_UP`` when all legs are done.
        probe: Where that search is; the iterate itself stays at the smallest residual.
        way: How products with the Jacobian are formed.
    """

    g: Tensor
    error: Tensor
    forcing: Tensor
    radius: Tensor
    excursion: Tensor
    probe: Point
    way: Way = "forward mode"

    @property
    def displacement(self) -> Tensor:
        return self.g

    @property
    def image_is_nearer(self) -> bool | None:
        return False  # as for Newton


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method on ``z - f(z) = 0``, its linear systems solved by a Krylov method to a forcing term.

    With g = f(z) - z and J = df/dz, each step solves

        |(I - J) s - g| <= eta |g|,    z <- z + s,

    if that reduces the residual |g|. Otherwise a sample of more than 32 unknowns takes the first shorter step along s
    that does. A sample of at most 32 unknowns forms I - J instead and minimizes |(I - J) s - g| within a trust region,
    with corrections that follow curved valleys; this also works where I - J is singular. Where no such step is left, at
    a minimum of |g| that is not a solution, it searches elsewhere: a few leaps along Newton's direction, each with a
    descent from where it leads. The iterate moves there once the residual is smaller.

    The residual never grows: a sample that finds no smaller one stays where it is, and the driver reports STAGNATED.
    Converges quadratically near a regular solution, also where ``f`` expands. Use it where the other solvers crawl or
    fail: a step costs a call of ``f``, one more for each step that is rejected, and a product J v for every step of the
    linear solver. Products are formed by forward mode, which counts as a call of ``f``. Where ``f`` does not support it
    they are formed by differentiating twice or by finite differences, whichever works.

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
        Moré, "The Levenberg-Marquardt algorithm: implementation and theory", Lecture Notes in Math. 630 (1978).
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
        return self.begin(z0, f(z0))

    def begin(self, z: Tensor, fz: Tensor) -> NewtonKrylovState:
        """The state at the start ``z`` (B, D), where the map is ``fz`` (B, D)."""
        g = fz - z
        error = rms_norm(g)
        return NewtonKrylovState(
            z=z,
            fz=fz,
            g=g,
            error=error,
            forcing=torch.full_like(error, self.forcing or _FIRST_FORCING),
            radius=torch.full_like(error, math.inf),
            excursion=torch.zeros_like(error, dtype=torch.int64),
            probe=Point(z, fz, g, error),
        )

    def restarted(self, state: NewtonKrylovState, rows: Tensor, z: Tensor, fz: Tensor) -> NewtonKrylovState:
        """The state with the samples ``rows`` (B,) at their rows of ``z`` and ``fz`` (B, D), as if they began there."""
        new = self.begin(z, fz)
        chosen = rows.unsqueeze(1)
        return NewtonKrylovState(
            z=torch.where(chosen, z, state.z),
            fz=torch.where(chosen, fz, state.fz),
            g=torch.where(chosen, new.g, state.g),
            error=torch.where(rows, new.error, state.error),
            forcing=torch.where(rows, new.forcing, state.forcing),
            radius=torch.where(rows, new.radius, state.radius),
            excursion=torch.where(rows, 0, state.excursion),
            probe=new.probe.where(rows, state.probe),
            way=state.way,
        )

    def step(self, f: FlatMapping, state: NewtonKrylovState) -> NewtonKrylovState:
        return self.step_some(f, state, torch.ones_like(state.error, dtype=torch.bool), state.z)

    @torch.no_grad()
    def step_some(self, f: FlatMapping, state: NewtonKrylovState, rows: Tensor, others: Tensor) -> NewtonKrylovState:
        """A step of the samples ``rows`` (B,) only; the others go to their rows of ``others`` (B, D)."""
        few, point_at = state.z.shape[1] <= FEW_UNKNOWNS, functools.partial(Point.at, f)
        eps, scale = torch.finfo(state.error.dtype).eps, rms_norm(state.fz)
        # A sample without a finite residual, or with one at the level of rounding errors, stays where it is.
        floor = 0.0 if isinstance(f, RootMap) else eps * scale  # that of F is not known
        unsolved = rows & state.error.isfinite() & (state.error > floor)
        away = unsolved & (state.excursion > 0) & (state.excursion < _GIVEN_UP)
        leaps = away & (state.excursion % _LEG == 0)
        explores = away & ~leaps
        limited = unsolved & (state.excursion == 0) & state.radius.isfinite()
        free = unsolved & (state.excursion == 0) & ~limited

        home = Point(state.z, state.fz, state.g, state.error)
        at = state.probe.where(explores, home)
        system = _Linearized(f, at, state.way)
        s, found_step = self._krylov_step(system, at.g, free, state.forcing * state.error)
        model = None
        if few and bool((away | limited).any()):
            model = system.model()
            s = torch.where(leaps.unsqueeze(1), _leap(model, home, state.excursion), s)

        waiting = Point(torch.where(rows.unsqueeze(1), state.z, others), state.fz, state.g, state.error)
        trial, accepted = waiting, ~rows
        if bool((free | leaps | ~rows).any()):
            trial = point_at(torch.where((free | leaps).unsqueeze(1), home.z + s, waiting.z))
            # A step that does far worse than promised is left to the trust region, if there is one.
            enough = (1 + state.forcing) / 2 if few else torch.full_like(scale, 1 - SUFFICIENT)
            # A plain step, where there is no other, may do little: it leads away from where the matrix is singular.
            enough = torch.where(
                found_step, enough * state.error, torch.nextafter(state.error, torch.zeros_like(scale))
            )
            accepted = accepted | (free & (trial.error <= enough))
        end = trial.where(accepted, waiting)
        probe = trial.where(leaps, at)
        radius = torch.where(accepted | leaps, math.inf, state.radius)
        # After a leap to where the map is not finite the next leg begins.
        steps = torch.where(leaps & ~trial.error.isfinite(), _LEG, 1)

        descends = limited | (free & ~accepted) | explores
        found = descends
        if bool(descends.any()):
            if few:
                model = model or system.model()
                lower, radius, found = descend(point_at, at, model, radius, descends)
                if bool((lost := descends & ~explores & ~found).any()):  # as where the matrix is zero up to rounding
                    plain = point_at(torch.where(lost.unsqueeze(1), at.fz, at.z))
                    helps = lost & (plain.error < at.error)
                    lower, found = plain.where(helps, lower), found | helps
            else:
                lower, found = backtrack(point_at, at, s, trial, descends)
            end = lower.where(found & ~explores, end)
            probe = lower.where(found & explores, probe)
            steps = torch.where(explores & ~found, _LEG - state.excursion % _LEG, steps)
        # Near a solution it is rounding that leaves no smaller residual nearby.
        hopeful = few & (state.error > eps**0.5 * scale)
        excursion = torch.where(away, state.excursion + steps, state.excursion)
        excursion = torch.where(descends & ~explores & ~found, torch.where(hopeful, _LEG, _GIVEN_UP), excursion)
        arrived = away & (probe.error <= (1 - SUFFICIENT) * state.error)
        end = probe.where(arrived, end)
        return NewtonKrylovState(
            z=end.z,
            fz=end.fz,
            g=end.g,
            error=end.error,
            forcing=self._next_forcing(state, end.error),
            radius=radius,
            excursion=torch.where(arrived, 0, excursion),
            # Without excursions, no memory for them.
            probe=probe if few else end,
            way=system.way,
        )

    def _krylov_step(self, system: "_Linearized", g: Tensor, rows: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) the inexact Newton steps of the samples ``rows`` (B,), zero for the others; (B,) which there are.

        A linear solve that finds nothing leaves a plain step.
        """
        b = torch.where(rows.unsqueeze(1), g, 0.0)
        solver = self.linear_solver.with_preconditioners(system.flat)
        s = solver.run(system, b, tolerance=torch.where(rows, tolerance, 0.0)).x
        usable = s.isfinite().all(dim=1) & s.any(dim=1)
        return torch.where(usable.unsqueeze(1), s, b), usable

    def _next_forcing(self, state: NewtonKrylovState, error: Tensor) -> Tensor:
        if self.forcing is not None:
            return state.forcing
        wanted = _GAMMA * (error / state.error.clamp_min(torch.finfo(error.dtype).tiny)) ** _ALPHA
        # The safeguard: a forcing term that was large must not become small at once.
        floor = _GAMMA * state.forcing**_ALPHA
        wanted = torch.where(floor > 0.1, torch.maximum(wanted, floor), wanted)
        return torch.where(wanted.isfinite(), wanted, _LARGEST_FORCING).clamp(1e-6, _LARGEST_FORCING)


class _Linearized:
    """The linear model ``g - A s`` of a map's displacement, with A = I - J, or c times the Jacobian of F for a root."""

    def __init__(self, f: FlatMapping, at: Point, way: Way) -> None:
        self._g, self._scaling = at.g, None
        self._layout = f.layout if isinstance(f, FlatMap) else None
        if isinstance(f, RootMap) and f.scaling is not None:
            # By F itself: from v - (v - c J v) few digits would be left where c J v is small.
            self._scaling = f.scaling
            self._product = JacobianProduct(f.residual, at.z, at.g / -f.scaling, way)
        else:
            self._product = JacobianProduct(f, at.z, at.fz, way)

    @property
    def way(self) -> Way:
        """How the last product was formed."""
        return self._product.way

    def __call__(self, v: Tensor) -> Tensor:
        """(B, D) ``A v``."""
        return v - self._product(v) if self._scaling is None else self._scaling * self._product(v)

    def flat(self, preconditioner: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        """(B, D) -> (B, D) the same as ``preconditioner``, which is written for states as f takes them."""
        layout = self._layout
        return preconditioner if layout is None else lambda v: layout.pack(preconditioner(layout.unpack(v)))

    def model(self) -> DenseModel:
        """The model with the whole matrix."""
        matrix = self._product.matrix()
        if self._scaling is None:
            return DenseModel.of(torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) - matrix, self._g)
        return DenseModel.of(self._scaling.unsqueeze(2) * matrix, self._g)


def _leap(model: DenseModel, home: Point, excursion: Tensor) -> Tensor:
    """(B, D) the leap at the beginning of an excursion's leg."""
    s = model.step(torch.full_like(home.error, math.inf)).s
    sizes = s.new_tensor(_LEAPS)[(excursion // _LEG - 1).clamp(0, len(_LEAPS) - 1)]
    reach = sizes * torch.maximum(rms_norm(home.z), rms_norm(home.fz))
    return s * (reach * inverse_or_zero(rms_norm(s), 0.0)).unsqueeze(1)
