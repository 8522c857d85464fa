"""A batch of small contractions, one per row, for tests that change one row and compare the others."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RowContractions:
    """A batch of maps ``z -> rate * h(0.6 z + 0.4 roll(z)) + growth * z + shift`` with h(u) = u / sqrt(1 + u^2).

    The slopes of h are in (0, 1], and averaging z with its neighbors has norm 1. A row without growth therefore
    contracts by its ``rate`` in the root mean square. All operations act on single entries and are correctly rounded:
    a row gives the same bits in any batch and any memory layout.

    Attributes:
        rate: (B, 1) the Lipschitz constants.
        growth: (B, 1) zero for contractions; a row with growth above 1 diverges under Picard iteration.
        shift: (B, D) the constant term.
    """

    rate: Tensor
    growth: Tensor
    shift: Tensor

    @classmethod
    def make(
        cls, batch: int = 6, size: int = 16, dtype: torch.dtype = torch.float64, *, slowest: float = 0.9
    ) -> "RowContractions":
        """Create contractions with rates from 0.1 to ``slowest``; every call creates the same ones."""
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(batch, size, dtype=torch.float64, generator=generator)
        rate = torch.linspace(0.1, slowest, batch, dtype=torch.float64).unsqueeze(1)
        return cls(rate.to(dtype), torch.zeros_like(rate, dtype=dtype), shift.to(dtype))

    def __call__(self, z: Tensor) -> Tensor:
        u = 0.6 * z + 0.4 * z.roll(1, dims=-1)
        return self.rate * (u / torch.sqrt(1 + u * u)) + self.growth * z + self.shift

    def select(self, rows: Tensor) -> "RowContractions":
        """Return the maps of the rows with these indices (n,)."""
        return RowContractions(self.rate[rows], self.growth[rows], self.shift[rows])

    def replace(self, row: int, *, growth: float = 0.0, shift: float | None = None) -> "RowContractions":
        """Return the same maps, except that one row gets this growth and, in every entry, this shift."""
        growths, shifts = self.growth.clone(), self.shift.clone()
        growths[row] = growth
        if shift is not None:
            shifts[row] = shift
        return RowContractions(self.rate, growths, shifts)

    @property
    def start(self) -> Tensor:
        """The start of a solve: (B, D) zeros."""
        return torch.zeros_like(self.shift)

    def solution(self) -> Tensor:
        """Return the fixed points (B, D) of contractions, accurate to rounding."""
        z = self.start
        for _ in range(400):
            z = self(z)
        return z
