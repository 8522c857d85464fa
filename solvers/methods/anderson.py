"""Anderson acceleration (type II)."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.problem.hyperparameters import require_damping, require_positive_int
from solvers.problem.small_systems import back_substitute, inverse_or_zero, solve_positive_definite
from solvers.problem.window import (
    Slot,
    add_combination,
    cleared,
    differentiated,
    dot,
    is_slot,
    recorded,
    row_of_products,
    slots,
    store_difference,
    vector_at,
    with_slots,
    zero_where_not_finite,
)

# Bound on the rounding error in a column of unit length among n columns, in units of n * eps.
RIDGE = 8
# Bound on the rounding errors in f(z) - z, in units of eps times f(z).
NOISE = 4


@dataclasses.dataclass
class AndersonState(State):
    """The last n <= memory steps; slot i of each block belongs to the same step.

    Attributes:
        g: (B, D) ``f(z) - z``.
        steps: Number of steps after the first, a Python int; () int64 in a state of fixed shape.
        df: (B, m, D) differences of ``f(z)``.
        dg: (B, m, D) differences of ``g``.
        gram: (B, n, n) inner products of the differences of ``g``, with the ridge added to the diagonal.
        norms: (B, m + 1, 1) norms of the last ``g``, infinite where there is none yet; None without the safeguard.
    """

    g: Tensor
    steps: int | Tensor = 0
    df: Tensor | None = None
    dg: Tensor | None = None
    gram: Tensor | None = None
    norms: Tensor | None = None

    @property
    def displacement(self) -> Tensor:
        return self.g

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        return () if self.df is None or self.dg is None else (self.df, self.dg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration: extrapolates from the last steps as if the map were linear.

    With g = f(z) - z and the differences of the last n <= memory steps as columns of dF and dG,

        gamma = argmin |g - dG gamma|,    z <- z + damping * g - (dF - (1 - damping) * dG) gamma.

    This is the default choice: on a linear map it is as fast as GMRES with the same memory, and near a fixed point
    every smooth map is nearly linear. It costs one call of ``f`` per step and 2 * memory + 6 vectors of the state's
    size.

    The textbook drops the oldest columns until a condition number is small enough. Here nothing is dropped: "gram" adds
    a ridge of a few rounding errors to each column's own square, so that columns that are linearly dependent to working
    precision share a coefficient, whatever their lengths; "qr" leaves the older of them out. Both work sample by
    sample, so no sample is singular and nothing raises. Derivatives through the steps are those with columns at the
    level of rounding left out, so that steps after convergence do not spoil them.

    The safeguard is a watchdog: if none of a sample's last ``memory`` residuals is smaller than the one before them,
    its next step is the plain step from that earlier iterate. So if the map contracts in the Euclidean norm, the
    smallest residual falls at least every memory + 1 steps, even if extrapolation leads astray because the map has
    kinks or saturates. In between residuals may rise, as they do on the way to many solutions.

    Args:
        memory: How many differences to keep. 5 is a good start, 10 pays on slowly converging maps.
        damping: Mixing factor in (0, 1]; 1 is undamped.
        least_squares: "gram" solves the least-squares problem through its Gram matrix, one row of which is computed
            in each step; directions closer than about sqrt(eps) count as dependent. "qr" orthogonalizes the columns in
            every step, which takes about memory / 2 times the vector work and resolves directions down to eps.
        safeguard: Whether to take back steps that have not helped. False is the textbook's method; its algebra is a
            sixth cheaper for small states.

    References:
        Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12 (1965).
        Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), eq. (2.2).
        Chamberlain, Powell, Lemarechal and Pedersen, "The watchdog technique for forcing convergence in algorithms for
        constrained optimization", Math. Programming Study 16 (1982).
    """

    memory: int = 5
    damping: float = 1.0
    least_squares: Literal["gram", "qr"] = "gram"
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.least_squares not in ("gram", "qr"):
            raise ValueError(f'Anderson(least_squares=...) must be "gram" or "qr", got {self.least_squares!r}.')
        require_positive_int(self, "memory", self.memory)
        require_damping(self, self.damping)

    def init(self, f: FlatMapping, z0: Tensor) -> AndersonState:
        fz = f(z0)
        g = fz - z0
        norms = None
        if self.safeguard:
            norms = _put_norm(g.detach().new_full((g.shape[0], self.memory + 1, 1), math.inf), 0, g)
        return AndersonState(z=z0, fz=fz, g=g, norms=norms)

    def step(self, f: FlatMapping, state: AndersonState) -> AndersonState:
        z = self.propose(state)
        return self.absorb(state, z, f(z))

    def propose(self, state: AndersonState) -> Tensor:
        """The next iterate (B, D)."""
        plain = state.fz if self.damping == 1.0 else state.z.lerp(state.fz, self.damping)
        if state.df is None or state.dg is None or state.gram is None:
            return plain
        n = state.gram.shape[1]
        df, dg = slots(state.df, n), slots(state.dg, n)
        if self.least_squares == "qr":
            # The newest comes first, so that of two dependent columns the older is left out. The order is its own
            # inverse.
            order = (state.steps - 1 - torch.arange(n, device=dg.device)) % n
            gamma = _least_squares_qr(dg.index_select(1, order), state.g, _noise(state))
            return self._extrapolated(state, plain, df, dg, gamma.index_select(1, order).unsqueeze(1))
        products = row_of_products(dg, state.g)
        z = self._extrapolated(state, plain, df, dg, _least_squares_gram(state.gram, products))
        if not differentiated(z):
            return z
        # Coefficients of columns of rounding errors do no harm, but their derivatives are wild. Those of the
        # coefficients of long enough columns are not, and the same where no column is that short.
        longer = state.gram + torch.diag_embed(_noise(state).square().expand(-1, n))
        tame = self._extrapolated(state, plain, df, dg, _least_squares_gram(longer, products))
        return z.detach() + (tame - tame.detach())

    def _extrapolated(self, state: AndersonState, plain: Tensor, df: Tensor, dg: Tensor, gamma: Tensor) -> Tensor:
        """The next iterate (B, D), given that of a plain step (B, D) and the coefficients (B, 1, n)."""
        if state.norms is not None:
            # Coefficients that are all 1 take every remembered step back.
            oldest = (state.steps + 1) % (self.memory + 1)
            in_vain = state.norms.argmin(dim=1, keepdim=True) == oldest  # (B, 1, 1)
            gamma = gamma.masked_fill(in_vain, 1.0)
        if self.damping != 1.0:
            plain = add_combination(plain, dg, gamma, 1.0 - self.damping)
        return add_combination(plain, df, gamma, -1.0)

    def absorb(self, state: AndersonState, z: Tensor, fz: Tensor) -> AndersonState:
        """The state at any z (B, D), with its image ``fz``, that stores the differences from ``state``."""
        steps = state.steps + 1
        slot = state.steps % self.memory
        n = self.memory if isinstance(steps, Tensor) else min(steps, self.memory)
        g = fz - z
        df = store_difference(state.df, slot, zero_where_not_finite(fz, g), state.fz, self.memory)
        dg = store_difference(state.dg, slot, zero_where_not_finite(g, g), state.g, self.memory)
        row = row_of_products(slots(dg, n), vector_at(dg, slot))
        gram = _with_row(state.gram, slot, row, RIDGE * self.memory)
        norms = None if state.norms is None else _put_norm(state.norms, steps % (self.memory + 1), g)
        return AndersonState(z=z, fz=fz, g=g, steps=steps, df=df, dg=dg, gram=gram, norms=norms)

    def restarted(self, state: AndersonState, rows: Tensor, z: Tensor, fz: Tensor) -> AndersonState:
        state = super().restarted(state, rows, z, fz)
        g = state.fz - state.z
        df, dg, gram, norms = state.df, state.dg, state.gram, state.norms
        if df is not None and dg is not None and gram is not None:
            # Columns of length zero, whose squares _with_row takes for 1.
            df, dg = cleared(df, rows), cleared(dg, rows)
            gram = replaced(gram, rows, torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device))
        if norms is not None:
            alone = _put_norm(torch.full_like(norms, math.inf), state.steps % (self.memory + 1), g)
            norms = replaced(norms, rows, alone)
        return dataclasses.replace(state, g=g, df=df, dg=dg, gram=gram, norms=norms)

    @property
    def compiles(self) -> bool:
        return True

    def fixed_shape(self, state: AndersonState, room: int) -> AndersonState:
        if isinstance(state.steps, Tensor):
            return state
        m, held = self.memory, 0 if state.gram is None else state.gram.shape[1]
        # Columns of length zero, whose squares _with_row takes for 1.
        gram = torch.eye(m, dtype=state.g.dtype, device=state.g.device).repeat(state.g.shape[0], 1, 1)
        if state.gram is not None:
            gram[:, :held, :held] = state.gram
        df, dg = (with_slots(state.g, m, None if block is None else block[:, :held]) for block in (state.df, state.dg))
        steps = torch.full((), state.steps, dtype=torch.int64, device=state.g.device)
        return dataclasses.replace(state, steps=steps, df=df, dg=dg, gram=gram)


def _noise(state: AndersonState) -> Tensor:
    """(B, 1) the size of rounding errors in g: of entries of f(z) that are not fixed, because those have none."""
    scale: Tensor = torch.linalg.vector_norm(state.fz.detach().masked_fill(state.g == 0, 0.0), dim=1, keepdim=True)
    return NOISE * torch.finfo(scale.dtype).eps * scale


def _put_norm(norms: Tensor, slot: Slot, g: Tensor) -> Tensor:
    """``norms`` with the norm of g in a slot. No gradient is recorded, because norms are only compared.

    Writes in place where none is recorded of g either: what is recorded may be computed again.
    """
    if isinstance(slot, Tensor):
        here = is_slot(slot, norms.shape[1], norms).view(1, -1, 1)
        return torch.where(here, torch.linalg.vector_norm(g, dim=1).view(-1, 1, 1), norms)
    if recorded(g):
        norms, g = norms.clone(), g.detach()
    norms[:, slot] = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    return norms


def _with_row(gram: Tensor | None, slot: Slot, row: Tensor, ridge: float) -> Tensor:
    """The Gram matrix (B, n, n) with ``row`` (B, 1, n) as row and column ``slot``; it may grow by one.

    The diagonal gets a ridge, in units of rounding errors of the column's own square. A square that has underflowed is
    replaced by 1, which makes the coefficient of that column negligible.
    """
    info = torch.finfo(row.dtype)
    if isinstance(slot, Tensor):
        assert gram is not None
        here = is_slot(slot, row.shape[2], row)
        square = torch.nn.functional.threshold(row * (1 + ridge * info.eps), info.tiny / info.eps, 1.0)
        row = torch.where(here, square, row)
        return torch.where(here.unsqueeze(1), row, torch.where(here, row.mT, gram))
    square = row.select(2, slot).mul_(1 + ridge * info.eps)
    torch.threshold_(square, info.tiny / info.eps, 1.0)
    if gram is None:
        return row
    if slot == gram.shape[1]:
        gram = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    elif recorded(gram, row):
        gram = gram.clone()
    gram.narrow(1, slot, 1).copy_(row)
    gram.narrow(2, slot, 1).copy_(row.mT)
    return gram


def _least_squares_gram(gram: Tensor, products: Tensor) -> Tensor:
    """Minimize ``|b - A x|``, given ``A' A`` (B, n, n) with its ridge and ``b' A`` (B, 1, n); returns x' (B, 1, n)."""
    # The rounding errors of Cholesky's method do not depend on how the columns are scaled. With the ridge the matrices
    # are positive definite or not finite.
    return solve_positive_definite(gram, products.mT).mT


def _least_squares_qr(columns: Tensor, rhs: Tensor, noise: Tensor) -> Tensor:
    """The same from the columns (B, n, D), by modified Gram-Schmidt in their order, above the size ``noise`` (B, 1)."""
    n = columns.shape[1]
    info = torch.finfo(rhs.dtype)
    # A length whose square underflows counts as zero.
    scale = inverse_or_zero(torch.linalg.vector_norm(columns, dim=2), (info.tiny / info.eps) ** 0.5)  # (B, n)
    columns = columns * scale.unsqueeze(2)
    thresholds = (noise * scale.detach()).clamp_min(RIDGE * n * info.eps)  # (B, n)
    rows = []
    for threshold in thresholds.split(1, dim=1):
        inverse = inverse_or_zero(torch.linalg.vector_norm(columns[:, 0], dim=1, keepdim=True), threshold)  # (B, 1)
        q = columns[:, 0] * inverse  # (B, D)
        row, value = dot(columns[:, 1:], q), (rhs * q).sum(dim=1, keepdim=True)
        rows.append((inverse, row, value))
        columns = columns[:, 1:] - row.unsqueeze(2) * q.unsqueeze(1)
        rhs = rhs - value * q
    return back_substitute(rows) * scale
