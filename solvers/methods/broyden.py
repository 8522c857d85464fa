"""Broyden's methods with a low-rank inverse Jacobian."""

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from solvers.methods.low_rank_inverse import LowRankInverse
from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.problem.hyperparameters import require_damping, require_positive_int
from solvers.problem.window import (
    Slot,
    add_combination,
    dot,
    recorded,
    row_of_products,
    store,
    store_quotient,
    vector_at,
    with_slots,
    zero_where_not_finite,
)

# The line search accepts a step if |g| is at most _GROWTH times its largest value at the last _RECENT iterates.
# Otherwise it multiplies the step by _SHORTER, at most _MOST_TRIALS times. Stricter tests cost more calls than they
# save, because good directions need not descend.
_GROWTH, _RECENT = 2.0, 10
_SHORTER, _MOST_TRIALS = 0.1, 6


@dataclasses.dataclass
class BroydenState(State):
    """The iterate, the next step, and the estimate of the inverse Jacobian.

    Attributes:
        direction: (B, D) ``-H g`` at ``z``, the next step before damping.
        inverse: The estimate ``H`` of the inverse Jacobian of ``f(z) - z``.
        recent: (B, n) the norms of ``g`` at the last n iterates, the newest last; n = 10 for a line search, else 1.
    """

    direction: Tensor
    inverse: LowRankInverse
    recent: Tensor

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        return () if self.inverse.u is None or self.inverse.v is None else (self.inverse.u, self.inverse.v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's first ("good") or second ("bad") method: a secant update of the inverse Jacobian in every step.

    With g = f(z) - z, s = dz, y = dg and H the estimate of the inverse Jacobian of g, started at -I,

        z <- z - damping * H g,    H <- H + (s - H y) v' / (v'y)    with v = H's (good) or v = y (bad).

    The first step is a Picard step. The method converges superlinearly near a regular solution, even if ``f`` does not
    contract. It costs one call of ``f`` per step and two vectors of the state's size per remembered update. The final
    estimate of the inverse Jacobian is ``solution.state.inverse``.

    Args:
        method: "good" is more robust where ``f`` expands or is far from linear. "bad" needs fewer calls where ``f``
            contracts slowly, and half the vector work per step.
        memory: How many updates to keep. When memory is full, H + I is truncated approximately to its largest singular
            values, which frees a third of the slots. None keeps all updates, which needs the fewest calls of ``f`` and
            the most memory. With 10 the number of calls rises a little, below 5 it rises a lot.
        damping: Step length in (0, 1]; 1 is the full step.
        line_search: Shorten a step tenfold, sample by sample, as long as the residual would exceed twice the largest of
            the last ten. Use it for starts from which full steps run away. Each trial costs a call of ``f`` and waits
            for the device once. This is not a descent method, because quasi-Newton steps sometimes have to go uphill.

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
        inverse, newton = self._with_free_slot(state)  # newton (B, D) is -H g at the old point
        n = inverse.rank
        if self.method == "good":
            v_block, overlap = self._append_good(inverse, state.direction, newton)

        s = state.direction if self.damping == 1.0 else self.damping * state.direction
        fz = None
        if self.line_search:
            z, fz, s = _search(f, state.z, s, _GROWTH * state.recent.amax(dim=1, keepdim=True))
        else:
            z = state.z + s
        # s + H g at the old point, which is zero except with damping, after a shortened step or after a truncation.
        rest = None if s is newton else _sum(s, newton, -1.0)
        del s, newton  # to make room for the call of f
        if fz is None:
            fz = f(z)
        g = fz - z
        g = zero_where_not_finite(g, g)

        if self.method == "bad":
            v_block, vy = self._append_bad(inverse, state, g)
        # (B, 1, n) with the old v, (B, 1, 1) with the new one
        vg_old, vg = _old_and_new(row_of_products(v_block if isinstance(n, Tensor) else v_block[:, : n + 1], g), n)
        if self.method == "good":
            vy = vg.squeeze(1) + overlap
        divisor = torch.where(_is_usable(vy, fz, state.recent[:, -1:]), vy, math.inf)  # infinite for no update
        recent = torch.cat((state.recent[:, 1:], _norm(g)), dim=1) if self.line_search else _norm(g)

        direction = g  # becomes -H g at the new point
        old = inverse.used(inverse.u)
        if old is not None:
            direction = add_combination(g, old, vg_old, -1.0, reuse=True)
        # u = (s - H y) / (v'y), where s - H y = (s + H g_old) - H g.
        numerator = direction if rest is None else _sum(rest, direction)
        u_block = store_quotient(inverse.u, n, numerator, divisor, self._capacity, self._first)
        del g, rest, numerator
        # -(H + u v') g
        direction = add_combination(direction, vector_at(u_block, n).unsqueeze(1), vg, -1.0, reuse=True)
        return BroydenState(
            z=z, fz=fz, direction=direction, inverse=LowRankInverse(n + 1, u_block, v_block), recent=recent
        )

    def restarted(self, state: BroydenState, rows: Tensor, z: Tensor, fz: Tensor) -> BroydenState:
        state = super().restarted(state, rows, z, fz)
        g = state.fz - state.z
        return dataclasses.replace(
            state,
            direction=replaced(state.direction, rows, g),
            inverse=state.inverse.cleared(rows),
            recent=replaced(state.recent, rows, _norm(g)),
        )

    @property
    def compiles(self) -> bool:
        # A truncation and a line search are decided on the host.
        return self.memory is None and not self.line_search

    def fixed_shape(self, state: BroydenState, room: int) -> BroydenState:
        rank = int(state.inverse.rank)
        u, v = (
            with_slots(state.z, rank + room, None if block is None else block[:, :rank])
            for block in (state.inverse.u, state.inverse.v)
        )
        return dataclasses.replace(
            state,
            inverse=LowRankInverse(torch.full((), rank, dtype=torch.int64, device=state.z.device), u, v),
            recent=state.recent.clone(),
        )

    def room(self, state: BroydenState) -> Tensor:
        assert state.inverse.u is not None
        return state.inverse.u.shape[1] - torch.as_tensor(state.inverse.rank)

    def _with_free_slot(self, state: BroydenState) -> tuple[LowRankInverse, Tensor]:
        """``H`` with room for one more pair, and ``-H g`` at the state's point, (B, D)."""
        rank = state.inverse.rank
        # A state of fixed shape has a free slot, or the solve would not have gone on.
        if self.memory is None or isinstance(rank, Tensor) or rank < self.memory:
            return state.inverse, state.direction
        inverse = state.inverse.truncated(self.memory - max(self.memory // 3, 1))
        return inverse, -inverse.mv(state.fz - state.z)

    # Both methods' v may have any length. The one that belongs to a unit vector s or y keeps the products from
    # underflow.

    def _append_good(self, inverse: LowRankInverse, direction: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        """The block of all v with ``v = H's`` for a unit vector s along ``direction``, and ``-v'g`` at the old point.

        The latter is s'newton, (B, 1). With the new g, ``v'y = v'g_new - v'g_old``.
        """
        s = direction / _size_or_inf(direction)
        block = store(inverse.v, inverse.rank, inverse.rmv(s), self._capacity, self._first)
        return block, (s * newton).sum(dim=1, keepdim=True)

    def _append_bad(self, inverse: LowRankInverse, state: BroydenState, g: Tensor) -> tuple[Tensor, Tensor]:
        """The block of all v with ``v = -y / |y|``, where ``y = g - g_old``, and ``v'y`` (B, 1)."""
        n = inverse.rank
        minus_y = _sum(state.fz - state.z, g, -1.0)  # (B, D); the sign cancels in H, as does the length
        block = store_quotient(inverse.v, n, minus_y, _size_or_inf(minus_y), self._capacity, self._first)
        return block, -dot(vector_at(block, n).unsqueeze(1), minus_y)

    @property
    def _capacity(self) -> int:
        return 2**62 if self.memory is None else self.memory

    @property
    def _first(self) -> int:
        # A limited memory is allocated at once, because growing needs room for the old block and the new one.
        return 8 if self.memory is None else self.memory


def _old_and_new(products: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """Products with every vector of a block -> those with the old ones, and the one (B, 1, 1) with that in ``slot``."""
    if isinstance(slot, Tensor):
        return products, products.index_select(2, slot.view(1))
    return products[:, :, :slot], products[:, :, slot:]


def _is_usable(vy: Tensor, fz: Tensor, old_size: Tensor) -> Tensor:
    """(B, 1) bool, whether a sample's secant pair may update its estimate.

    It may not where it would make the estimate singular, because ``v'y`` is near 0, nor where it consists of rounding
    errors of f: gradients through many such updates grow without bound.

    Args:
        vy: (B, 1)
        fz: (B, D) at the new point.
        old_size: (B, 1) the norm of ``g`` at the old point.
    """
    eps = torch.finfo(vy.dtype).eps
    return (vy.abs() > eps * old_size) & (old_size > 8 * eps * _norm(fz))


def _search(f: FlatMapping, start: Tensor, s: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the points ``start + t s``, t = 1, 1/10, 1/100 ..., with a residual of at most ``largest`` (B, 1).

    Returns:
        The point, its image, and ``t s``, all (B, D).
    """
    length = torch.ones_like(largest)
    z = start + s
    fz = f(z)
    for _ in range(_MOST_TRIALS):
        # A NaN is rejected too, except for a sample that has had no finite residual.
        rejected = ~(_norm(fz - z) <= largest) & largest.isfinite()
        if not bool(rejected.any()):
            break
        length = torch.where(rejected, _SHORTER * length, length)
        z = torch.where(rejected, start + length * s, z)
        # f is called with the same z again for accepted samples, which keep their image.
        fz = torch.where(rejected, f(z), fz)
    return z, fz, length * s


def _sum(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """``x + factor * y``, in the memory of ``x`` where no gradient is recorded."""
    return torch.add(x, y, alpha=factor) if recorded(x, y) else x.add_(y, alpha=factor)


def _norm(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1), without a gradient, because that of a norm at zero is not finite."""
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    return norm


def _size_or_inf(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1) the norm as a divisor: infinite where it has vanished."""
    size = _norm(x)
    return torch.where(size > torch.finfo(size.dtype).tiny, size, math.inf)
