"""Small contractions, one a row, for tests of what a solver does to one row and not to the others."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RowContractions:
    """A batch of maps ``z -> rate * h(0.6 z + 0.4 roll(z)) + growth * z + shift`` with h(u) = u / sqrt(1 + u^2).

    h has slopes in (0, 1] and the mean of z and its neighbours has norm 1, so that a row without growth contracts by
    its ``rate`` in the root mean square. Every operation is made entry by entry and rounded exactly: the same row gives
    the same bits in any batch and any memory layout.

    Attributes:
        rate: (B, 1) the Lipschitz constants.
        growth: (B, 1) 0 for contractions; beyond 1 a row diverges under Picard iteration.
        shift: (B, D).
    """

    rate: Tensor
    growth: Tensor
    shift: Tensor

    @classmethod
    def make(
        cls, batch: int = 6, size: int = 16, dtype: torch.dtype = torch.float64, *, slowest: float = 0.9
    ) -> "RowContractions":
        """Contractions with rates from 0.1 to ``slowest``, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(batch, size, dtype=torch.float64, generator=generator)
        rate = torch.linspace(0.1, slowest, batch, dtype=torch.float64).unsqueeze(1)
        return cls(rate.to(dtype), torch.zeros_like(rate, dtype=dtype), shift.to(dtype))

    def __call__(self, z: Tensor) -> Tensor:
        u = 0.6 * z + 0.4 * z.roll(1, dims=-1)
        return self.rate * (u / torch.sqrt(1 + u * u)) + self.growth * z + self.shift

    def select(self, rows: Tensor) -> "RowContractions":
        """The maps of these rows, by index (n,)."""
        return RowContractions(self.rate[rows], self.growth[rows], self.shift[rows])

    def replace(self, row: int, *, growth: float = 0.0, shift: float | None = None) -> "RowContractions":
        """The same maps but for one row, which gets this growth and, in every entry, this shift."""
        growths, shifts = self.growth.clone(), self.shift.clone()
        growths[row] = growth
        if shift is not None:
            shifts[row] = shift
        return RowContractions(self.rate, growths, shifts)

    @property
    def start(self) -> Tensor:
        """(B, D) zeros."""
        return torch.zeros_like(self.shift)

    def solution(self) -> Tensor:
        """(B, D) the fixed points of contractions, to rounding."""
        z = self.start
        for _ in range(400):
            z = self(z)
        return z
