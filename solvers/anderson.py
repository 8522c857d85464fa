"""Anderson acceleration (type II)."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from solvers._base import FlatMapping, Solver, State
from solvers._hyperparameters import require_damping, require_positive_int
from solvers._small_systems import back_substitute, inverse_or_zero
from solvers._window import combine, dot, store


@dataclasses.dataclass
class AndersonState(State):
    """What Anderson remembers of its last n <= memory steps; slot i of each block belongs to the same step.

    Attributes:
        g: (B, D) the residual ``f(z) - z``.
        steps: Steps taken after the first, on the host.
        df: (B, m, D) differences of ``f(z)``.
        dg: (B, m, D) differences of ``g``.
        gram: (B, n, n) inner products of the residual differences.
    """

    g: Tensor
    steps: int = 0
    df: Tensor | None = None
    dg: Tensor | None = None
    gram: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration: extrapolates from the last steps what a linear map would do next.

    With g = f(z) - z and the differences of the last n <= memory steps as columns of dF and dG,

        gamma = argmin |g - dG gamma|,    z <- z + damping * g - (dF - (1 - damping) * dG) gamma.

    The default choice: on a linear map it is as fast as GMRES with the same memory, and near a fixed point every
    smooth map is linear. Costs one call of ``f`` a step and 2 * memory + 5 vectors of the state's size.

    The columns are scaled to unit length, sample by sample, before anything is compared or added: columns that depend
    on each other to working precision share a coefficient ("gram"), or the older is left out ("qr"). No sample is
    singular, and nothing raises. (The textbook drops the oldest columns until a condition number is small enough.)

    Args:
        memory: How many differences to keep. 5 is a good start, 10 pays on slowly converging maps.
        damping: Mixing factor in (0, 1]; 1 is undamped.
        least_squares: "gram" solves the least-squares problem through its Gram matrix, of which a step computes one
            new row; directions closer than about sqrt(eps) count as dependent. "qr" orthogonalizes the columns in
            every step, about memory / 2 times the vector work, and tells directions apart down to eps.

    References:
        Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12 (1965).
        Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), eq. (2.2).
    """

    memory: int = 5
    damping: float = 1.0
    least_squares: Literal["gram", "qr"] = "gram"

    def __post_init__(self) -> None:
        if self.least_squares not in ("gram", "qr"):
            raise ValueError(f'Anderson(least_squares=...) must be "gram" or "qr", got {self.least_squares!r}.')
        require_positive_int(self, "memory", self.memory)
        require_damping(self, self.damping)

    def init(self, f: FlatMapping, z0: Tensor) -> AndersonState:
        fz = f(z0)
        return AndersonState(z=z0, fz=fz, g=fz - z0)

    def step(self, f: FlatMapping, state: AndersonState) -> AndersonState:
        z = self.propose(state)
        return self.absorb(state, z, f(z))

    def propose(self, state: AndersonState) -> Tensor:
        """The next iterate (B, D)."""
        z = state.fz if self.damping == 1.0 else state.z.lerp(state.fz, self.damping)
        if state.df is not None and state.dg is not None and state.gram is not None:
            n = state.gram.shape[1]
            gamma = self._coefficients(state.dg[:, :n], state.gram, state.g, state.steps % self.memory)
            z = z - combine(state.df[:, :n], gamma)
            if self.damping != 1.0:
                z = z + (1.0 - self.damping) * combine(state.dg[:, :n], gamma)
        return z

    def absorb(self, state: AndersonState, z: Tensor, fz: Tensor) -> AndersonState:
        """The state at any z (B, D) with its image ``fz``, which remembers the differences from ``state``."""
        g = fz - z
        dg = g - state.g
        slot = state.steps % self.memory
        df_block = store(state.df, slot, fz - state.fz, self.memory)
        dg_block = store(state.dg, slot, dg, self.memory)
        n = min(state.steps + 1, self.memory)
        row = dot(dg_block[:, :n], dg)  # (B, n)
        gram = _with_row_and_column(state.gram, slot, row)
        return AndersonState(z=z, fz=fz, g=g, steps=state.steps + 1, df=df_block, dg=dg_block, gram=gram)

    def _coefficients(self, dg: Tensor, gram: Tensor, g: Tensor, next_slot: int) -> Tensor:
        """gamma (B, n)."""
        if self.least_squares == "gram":
            return _least_squares_gram(dg, gram, g)
        # The newest first, so that of two dependent columns the older is left out.
        newest_first = dg.roll(-next_slot, dims=1).flip(1)
        return _least_squares_qr(newest_first, g).flip(1).roll(next_slot, dims=1)


def _with_row_and_column(gram: Tensor | None, slot: int, row: Tensor) -> Tensor:
    """The symmetric (B, n, n) matrix with row and column ``slot`` set to ``row`` (B, n); it may grow by one."""
    if gram is None:
        return row.unsqueeze(2)
    n = row.shape[1]
    if n > gram.shape[1]:
        gram = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    at_slot = torch.arange(n, device=row.device) == slot
    gram = torch.where(at_slot.view(n, 1), row.unsqueeze(1), gram)
    return torch.where(at_slot, row.unsqueeze(2), gram)


def _least_squares_gram(columns: Tensor, gram: Tensor, rhs: Tensor) -> Tensor:
    """Minimize ``|b - A x|`` for the columns of A as (B, n, D), their Gram matrix (B, n, n), and b as (B, D).

    The columns are scaled to unit length, so that rounding in the Gram matrix is about n * eps, and as much is added to
    its diagonal: what that changes is rounding anyway, and dependent columns share their coefficient.
    """
    n = gram.shape[1]
    info = torch.finfo(gram.dtype)
    squares = gram.diagonal(dim1=1, dim2=2)  # (B, n)
    # A column that has vanished gets the coefficient 0. Its root is not taken: the gradient there is infinite.
    usable = squares > info.tiny
    scale = torch.where(usable, torch.where(usable, squares, 1.0).rsqrt(), 0.0)
    ridge = torch.eye(n, dtype=gram.dtype, device=gram.device) * (8 * n * info.eps)
    scaled = gram * scale.unsqueeze(1) * scale.unsqueeze(2) + ridge
    # The variant that does not check, which would wait for the device: the matrices are regular, or not finite.
    solution: Tensor = torch.linalg.solve_ex(scaled, dot(columns, rhs) * scale)[0]
    return solution * scale


def _least_squares_qr(columns: Tensor, rhs: Tensor) -> Tensor:
    """The same by modified Gram-Schmidt in the order of the columns; dependent is a sine near n * eps itself."""
    n = columns.shape[1]
    scale = inverse_or_zero(torch.linalg.vector_norm(columns, dim=2), 0.0)  # (B, n)
    columns = columns * scale.unsqueeze(2)
    threshold = 8 * n * torch.finfo(rhs.dtype).eps
    rows = []
    for _ in range(n):
        inverse = inverse_or_zero(torch.linalg.vector_norm(columns[:, 0], dim=1, keepdim=True), threshold)  # (B, 1)
        q = columns[:, 0] * inverse  # (B, D)
        row, value = dot(columns[:, 1:], q), (rhs * q).sum(dim=1, keepdim=True)
        rows.append((inverse, row, value))
        columns = columns[:, 1:] - row.unsqueeze(2) * q.unsqueeze(1)
        rhs = rhs - value * q
    return back_substitute(rows) * scale
