"""Newton's method with the whole Jacobian, for samples of few unknowns."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers.methods.dense_jacobian import with_jacobian
from solvers.methods.descent import SUFFICIENT, Point, backtrack
from solvers.methods.jacobian_product import Way
from solvers.methods.root_map import RootMap
from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.methods.trust_region import DenseModel, descend
from solvers.problem.flat_map import FlatMap
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import rms_norm


@dataclasses.dataclass
class NewtonState(State):
    """The iterate, with the residual and its Jacobian there.

    Attributes:
        residual: (B, D) ``f(z) - z``, or ``-F(z)`` for a root.
        matrix: (B, D, D) ``I - J`` with J the Jacobian of f, or the Jacobian of F.
        newton: (B, D) the step: the solution s of ``matrix s = residual``.
        error: (B,) Euclidean norm of the residual.
        singular: (B,) bool, whether there is no such step because the matrix is singular.
        radius: (B,) the trust region's radius; infinite for a sample that needs none.
        stale: Whether some samples have been put elsewhere, where the Jacobian is not known yet.
        of_root: Whether the step is what the stopping test looks at.
        way: How the Jacobian is formed.
    """

    residual: Tensor
    matrix: Tensor
    newton: Tensor
    error: Tensor
    singular: Tensor
    radius: Tensor
    stale: bool = False
    of_root: bool = False
    way: Way = "forward mode"

    @property
    def displacement(self) -> Tensor:
        return self.newton if self.of_root else self.residual

    @property
    def image_is_nearer(self) -> bool | None:
        return self.of_root  # a step that was shortened contracts wherever the map is flat enough

    @property
    def num_stuck(self) -> int:
        """How many samples are where the matrix is singular, without a solution."""
        return int((self.singular & (self.error > 0)).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton(Solver):
    """Newton's method with the whole Jacobian: ``(I - J) s = f(z) - z, z <- z + s``; for roots ``J s = -F(z)``.

    The Jacobian of all samples is formed by one batched call of the map in forward mode, and the systems are solved by
    one batched LU factorization. A full step that reduces the residual is taken. Otherwise, and where the matrix is
    singular, the sample takes a step within a trust region, with corrections that follow curved valleys. So the
    residual never grows; a sample that finds no smaller one stays where it is, and the driver reports it.

    Use it for many problems of few unknowns, one to about thirty each: memory and time grow with D^2 and D^3. For more
    unknowns use :class:`NewtonKrylov`, which needs products with J alone. A step costs one call of the map that carries
    D tangents, and one more call or several where a step is rejected. Where the map does not support forward mode, the
    Jacobian is formed column by column, by differentiating twice or by finite differences.

    For a root the stopping test looks at Newton's step itself, an estimate of the error that depends neither on the
    units of F nor on those of single equations; the value is the iterate after that step.

    Gradients do not flow through its steps: use it with the implicit backward mode, not with the unrolled one.

    Args:
        max_unknowns: The most unknowns of a sample. More are refused, because of the memory for the matrices.

    References:
        Deuflhard, "Newton methods for nonlinear problems: affine invariance and adaptive algorithms" (2004), chapter 2.
        Moré, "The Levenberg-Marquardt algorithm: implementation and theory", Lecture Notes in Math. 630 (1978).
    """

    differentiable: ClassVar[bool] = False

    max_unknowns: int = 512

    def __post_init__(self) -> None:
        require_positive_int(self, "max_unknowns", self.max_unknowns)

    @torch.no_grad()
    def init(self, f: FlatMapping, z0: Tensor) -> NewtonState:
        if z0.shape[1] > self.max_unknowns:
            raise ValueError(
                f"{self!r} forms the whole Jacobian, and a sample has {z0.shape[1]} unknowns. Use NewtonKrylov, which "
                "does not; if the leading dimensions index independent problems, say so with batch_dims; or raise "
                "max_unknowns."
            )
        z0 = z0.contiguous()
        if isinstance(f, RootMap):
            f.residual(z0)  # once without a transform, in which what F brings along could not be found
            return self._at(f, z0, None, "forward mode")
        fz = f(z0)
        return _unknown_jacobian(z0, fz)

    def restarted(self, state: NewtonState, rows: Tensor, z: Tensor, fz: Tensor) -> NewtonState:
        new = _unknown_jacobian(z, fz)
        parts: dict[str, Any] = {
            field.name: replaced(getattr(state, field.name), rows, getattr(new, field.name))
            for field in dataclasses.fields(state)
            if isinstance(getattr(state, field.name), Tensor)
        }
        return dataclasses.replace(state, **parts, stale=True)

    @torch.no_grad()
    def step(self, f: FlatMapping, state: NewtonState) -> NewtonState:
        if state.stale:
            state = self._at(f, state.z, state.radius, state.way)
        eps = torch.finfo(state.error.dtype).eps
        trial = self._at(f, state.z + state.newton, None, state.way)
        # Where the matrix is singular, a plain step that does no harm may lead to where it is not.
        enough = trial.error <= torch.where(state.singular, 1.0, 1 - SUFFICIENT) * state.error
        # A full step at the level of rounding is as good as any.
        tiny = state.newton.abs().amax(dim=1) <= 4 * eps * state.z.abs().amax(dim=1) if state.z.shape[1] else enough
        rejected = ~(enough | tiny | (state.error == 0)) & state.error.isfinite()
        limited = state.radius.isfinite()
        frozen = f.frozen if isinstance(f, FlatMap) else None
        if frozen is not None:  # whose residual does not belong to their iterate
            rejected, limited, enough = rejected & ~frozen, limited & ~frozen, enough | frozen
        if not bool((rejected | limited | ~enough).any()):
            return trial
        rejected = rejected | (limited & (state.error > 0))
        better = trial.error <= state.error
        z = torch.where((~rejected & better).unsqueeze(1), trial.z, state.z)
        radius = torch.where(rejected, state.radius, math.inf)
        if bool(rejected.any()):
            rows = rejected.nonzero().squeeze(1)
            lower, found, next_radius = self._shorter_step(f, state, trial, rows)
            z = z.index_copy(0, rows, torch.where(found.unsqueeze(1), lower, z.index_select(0, rows)))
            radius = radius.index_copy(0, rows, next_radius)
        moved = (z != trial.z).any(dim=1)
        if not bool(moved.any()):
            return dataclasses.replace(trial, radius=radius)
        return self._at(f, z, radius, trial.way)

    def _shorter_step(
        self, f: FlatMapping, state: NewtonState, trial: NewtonState, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step of the samples ``rows`` (n,) to a smaller residual than they have.

        Returns:
            (n, D) its end; (n,) bool, whether there is one; (n,) the radius of the next one.
        """
        # In the units of the map that f is, for which a root's residual is scaled.
        scaling = f.scaling[rows] if isinstance(f, RootMap) and f.scaling is not None else None

        def displacement(residual: Tensor) -> Tensor:
            return residual if scaling is None else scaling * residual

        def point_at(z: Tensor) -> Point:
            every = state.z.index_copy(0, rows, z)
            residual = -f.residual(every) if isinstance(f, RootMap) else f(every) - every
            return Point.displaced(z, displacement(residual.index_select(0, rows)))

        start, radius = Point.displaced(state.z[rows], displacement(state.residual[rows])), state.radius[rows]
        every = torch.ones_like(rows, dtype=torch.bool)
        if state.z.shape[1] == 1:  # where a shorter step is all that a trust region can find
            full = Point.displaced(trial.z[rows], displacement(trial.residual[rows]))
            lower, found = backtrack(point_at, start, full.z - start.z, full, every)
        else:
            matrix = state.matrix[rows]
            model = DenseModel.of(matrix if scaling is None else matrix * scaling.unsqueeze(2), start.g)
            lower, radius, found = descend(point_at, start, model, radius, every)
        if not bool(found.all()):  # where the matrix is zero up to rounding, a plain step leads away
            plain = point_at(torch.where(found.unsqueeze(1), start.z, start.fz))
            helps = ~found & (plain.error < start.error)
            lower, found = plain.where(helps, lower), found | helps
        return lower.z, found, radius

    def _at(self, f: FlatMapping, z: Tensor, radius: Tensor | None, way: Way) -> NewtonState:
        """The state at ``z`` (B, D)."""
        of_root = isinstance(f, RootMap)
        if isinstance(f, RootMap):
            residual, matrix, way = with_jacobian(f.residual, z, way)
            if f.scaling is None:
                f.set_scaling_by_matrix(z, residual, matrix)
            residual = -residual
            fz = z
        else:
            fz, jacobian, way = with_jacobian(f, z, way)
            residual = fz - z
            matrix = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) - jacobian
        newton, singular = _solve(matrix, residual)
        if isinstance(f, RootMap) and f.scaling is not None:
            # Where there is no step, what says that the residual is not zero.
            newton = torch.where(singular.unsqueeze(1), f.scaling * residual, newton)
            fz = z + newton
        else:
            newton = torch.where(singular.unsqueeze(1), residual, newton)
        error = torch.linalg.vector_norm(residual, dim=1)
        if radius is None:
            radius = torch.full_like(error, math.inf)
        return NewtonState(z, fz, residual, matrix, newton, error, singular, radius, False, of_root, way)


def newton_step(f: RootMap, z: Tensor) -> Tensor:
    """(B, D) Newton's step towards a root of ``f`` at ``z`` (B, D), the shortest one where there are many.

    Infinite where none halves the residual.
    """
    residual, matrix, _ = with_jacobian(f.residual, z)
    step, singular = _solve(matrix, -residual)
    if bool(singular.any()):
        rows = (singular & matrix.isfinite().flatten(1).all(dim=1)).nonzero().squeeze(1)
        some, target = matrix[rows], -residual[rows]
        shortest = (torch.linalg.pinv(some) @ target.unsqueeze(2)).squeeze(2)
        left = target - (some @ shortest.unsqueeze(2)).squeeze(2)
        helps = 2 * rms_norm(left) <= rms_norm(target)
        step = torch.where(singular.unsqueeze(1), math.inf, step)
        step = step.index_copy(0, rows, torch.where(helps.unsqueeze(1), shortest, math.inf))
    return step


def confirming_step(f: RootMap, state: State, z: Tensor) -> Tensor:
    """(B, D) Newton's step from ``z`` (B, D); zero where those of the solver in ``state`` are Newton's already.

    The residuals of Newton's method are its steps, except where there was none.
    """
    if isinstance(state, NewtonState) and not state.num_stuck:
        return torch.zeros_like(z)
    return newton_step(f, z)


def _unknown_jacobian(z: Tensor, fz: Tensor) -> NewtonState:
    """The state at z where f is fz, without the Jacobian."""
    residual = fz - z
    error = torch.linalg.vector_norm(residual, dim=1)
    return NewtonState(
        z=z,
        fz=fz,
        residual=residual,
        matrix=torch.zeros_like(z).unsqueeze(2).expand(-1, -1, z.shape[1]).contiguous(),
        newton=residual,
        error=error,
        singular=torch.zeros_like(error, dtype=torch.bool),
        radius=torch.full_like(error, math.inf),
        stale=True,
    )


def _solve(matrix: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) the solutions of ``matrix s = residual``, and (B,) bool, which matrices are singular."""
    if matrix.shape[1] == 1:
        step = residual / matrix.squeeze(2)
    else:
        step = torch.linalg.solve_ex(matrix, residual.unsqueeze(2))[0].squeeze(2)
    usable = step.isfinite().all(dim=1)
    # An infinite slope makes a step of zero.
    stuck = (step == 0).all(dim=1) & (residual != 0).any(dim=1)
    return step, ~usable | stuck
