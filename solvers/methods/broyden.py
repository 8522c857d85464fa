"""Broyden's methods with a low-rank inverse Jacobian."""

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from solvers.methods.low_rank_inverse import LowRankInverse
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem.hyperparameters import require_damping, require_positive_int
from solvers.problem.window import add_combination, dot, recorded, store, store_quotient

# The line search takes a step unless |g| grows beyond this times its largest value at the last so many iterates, and
# else a shorter one, so many times at most. Good directions need not descend: stricter tests cost more than they save.
_GROWTH, _RECENT = 2.0, 10
_SHORTER, _MOST_TRIALS = 0.1, 6


@dataclasses.dataclass
class BroydenState(State):
    """The iterate, the step that is to lead away from it, and the inverse Jacobian.

    Attributes:
        direction: (B, D) ``-H g`` at ``z``, the next step before damping.
        inverse: The estimate ``H`` of the inverse Jacobian of ``f(z) - z``.
        recent: (B, n) the norms of ``g`` at the last n iterates, the newest last; n = 10 for a line search, else 1.
    """

    direction: Tensor
    inverse: LowRankInverse
    recent: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's first ("good") and second ("bad") method: a secant update of the inverse Jacobian in every step.

    With g = f(z) - z, s = dz, y = dg and H the estimate of the inverse Jacobian of g, started at -I,

        z <- z - damping * H g,    H <- H + (s - H y) v' / (v'y)    with v = H's (good) or v = y (bad).

    The first step is a Picard step. Converges superlinearly near a regular solution, also where ``f`` does not
    contract. Costs one call of ``f`` a step and two vectors of the state's size a remembered update. Its inverse
    Jacobian estimate is kept in ``solution.state.inverse``.

    Args:
        method: "good" is the sturdier one where ``f`` expands or is far from linear. "bad" needs fewer calls where
            ``f`` contracts slowly, and half the vector work of a step.
        memory: How many updates to keep. When they are used up, the third of them that does least is dropped: H + I
            becomes its part with the largest singular values, about. None keeps all: fewest calls of ``f``, most
            memory. 10 need few calls more, below 5 they become many.
        damping: Step length in (0, 1]; 1 is the full step.
        line_search: Shorten a step tenfold, sample by sample, as long as the residual would grow beyond twice the
            largest of the last ten. For starts from which full steps run away; each trial is a call of ``f``, and one
            look at the host. Not a descent method: quasi-Newton steps need to go uphill.

    References:
        Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965), eq. (4.5),
        in the inverse form of Sherman and Morrison.
        Van de Rotten and Verduyn Lunel, "A limited memory Broyden method to solve high-dimensional systems of nonlinear
        equations", Equadiff 2003, for the reduction of the rank.
        Grippo, Lampariello and Lucidi, "A nonmonotone line search technique for Newton's method", SIAM J. Numer. Anal.
        23 (1986), for the comparison with the largest of the last values.
        Kelley, "Solving nonlinear equations with Newton's method", SIAM (2003), chapter 4.
    """

    estimates_inverse: ClassVar[bool] = True

    method: Literal["good", "bad"] = "good"
    memory: int | None = None
    damping: float = 1.0
    line_search: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("good", "bad"):
            raise ValueError(f'Broyden(method=...) must be "good" or "bad", got {self.method!r}.')
        require_positive_int(self, "memory", self.memory, optional=True)
        require_damping(self, self.damping)

    def init(self, f: FlatMapping, z0: Tensor) -> BroydenState:
        fz = f(z0)
        g = fz - z0
        recent = _norm(g).expand(-1, _RECENT if self.line_search else 1)
        return BroydenState(z=z0, fz=fz, direction=g, inverse=LowRankInverse(), recent=recent)

    def step(self, f: FlatMapping, state: BroydenState) -> BroydenState:
        inverse, newton = state.inverse, state.direction  # newton: -H g at the old point
        if self.memory is not None and inverse.rank == self.memory:
            inverse = inverse.truncated(self.memory - max(self.memory // 3, 1))
            newton = -inverse.mv(state.fz - state.z)

        n = inverse.rank
        # v may have any length. That of a unit vector s or y keeps the products from underflow.
        if self.method == "good":
            unit = state.direction / _size_or_inf(state.direction)
            v_block = store(inverse.v, n, inverse.rmv(unit), self._capacity, self._first)
            # v'g is unit'H g, and here minus that at the old point.
            overlap = (unit * newton).sum(dim=1, keepdim=True)
            del unit

        s = state.direction if self.damping == 1.0 else self.damping * state.direction
        if self.line_search:
            z, fz, length = _search(f, state.z, s, _GROWTH * state.recent.amax(dim=1, keepdim=True))
            s = length * s
        else:
            z = state.z + s
        # s - H y is -H g plus this difference. It is none but with damping, a shorter step, or after a truncation.
        rest = None if s is newton else _sum(s, newton, -1.0)
        del s, newton
        if not self.line_search:
            fz = f(z)
        g = fz - z

        if self.method == "bad":
            y = _sum(state.fz - state.z, g, -1.0)  # with its sign turned, which cancels as the length does
            v_block = store_quotient(inverse.v, n, y, _size_or_inf(y), self._capacity, self._first)
            vy = -dot(v_block[:, n : n + 1], y)
            del y
        products = dot(v_block[:, : n + 1], g)
        vg = products[:, n:]
        if self.method == "good":
            vy = vg + overlap
        # A sample goes without an update that would make the estimate singular, v'y being near 0, and without one that
        # is made of rounding errors of f: gradients through many of those grow without bound.
        eps = torch.finfo(g.dtype).eps
        old_size = state.recent[:, -1:]
        usable = (vy.abs() > eps * old_size) & (old_size > 8 * eps * _norm(fz))
        recent = torch.cat((state.recent[:, 1:], _norm(g)), dim=1) if self.line_search else _norm(g)

        direction = g  # -H g, with H as it was
        if inverse.u is not None and n > 0:
            direction = add_combination(g, inverse.u[:, :n], products[:, :n], -1.0, reuse=True)
        u = direction if rest is None else _sum(rest, direction)
        u_block = store_quotient(inverse.u, n, u, torch.where(usable, vy, math.inf), self._capacity, self._first)
        del g, u, rest
        return BroydenState(
            z=z,
            fz=fz,
            direction=add_combination(direction, u_block[:, n : n + 1], vg, -1.0, reuse=True),
            inverse=LowRankInverse(n + 1, u_block, v_block),
            recent=recent,
        )

    @property
    def _capacity(self) -> int:
        return 2**62 if self.memory is None else self.memory

    @property
    def _first(self) -> int:
        # All of it at once: growing takes the memory of the old block and the new.
        return 8 if self.memory is None else self.memory


def _search(f: FlatMapping, start: Tensor, s: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the points ``start + t s``, t = 1, 1/10, 1/100 ..., with a residual of at most ``largest`` (B, 1).

    Returns:
        The point and its image, both (B, D), and t (B, 1).
    """
    length = torch.ones_like(largest)
    z = start + s
    fz = f(z)
    for _ in range(_MOST_TRIALS):
        # Rejected also where the residual is nan, unless it always was.
        rejected = ~(_norm(fz - z) <= largest) & largest.isfinite()
        if not bool(rejected.any()):
            break
        length = torch.where(rejected, _SHORTER * length, length)
        z = torch.where(rejected, start + length * s, z)
        # Accepted samples come with the same z, and out with the same image.
        fz = torch.where(rejected, f(z), fz)
    return z, fz, length


def _sum(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """``x + factor * y``, in the memory of ``x`` where no gradient is recorded."""
    return torch.add(x, y, alpha=factor) if recorded(x, y) else x.add_(y, alpha=factor)


def _norm(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1), a constant for derivatives: those of a norm at zero are not finite."""
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    return norm


def _size_or_inf(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1) the norm, to divide by: infinite where it has vanished."""
    size = _norm(x)
    return torch.where(size > torch.finfo(size.dtype).tiny, size, math.inf)
