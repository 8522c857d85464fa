"""How the iterates of a solve change from step to step, and what that says about the error."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers.methods.solver import State

# Entries of a sample that are looked at; ratios of norms need no more, and large states need not be read again.
ENTRIES = 128

# Up to this factor the change of images over that of iterates, if not all entries are looked at, may be chance.
CHANCE = 1.1


@dataclasses.dataclass
class Secant:
    """The changes of z, f(z) and g = f(z) - z from one iterate to another.

    Near a solution z*, g is (J - I)(z - z*), and the same matrices take changes to changes. So the error of z is to the
    residual what the change of z is to that of g, and the error of f(z) what the change of f(z) is to that of g, along
    the direction of the step.

    Attributes:
        entries: (B, 3, n) some entries of the latest z, f(z) and g.
        contracts: (B,) bool, whether no step so far has brought images farther apart than iterates.
        dz: (B,) norm of the last change of z over these entries, as are the next two; NaN before there is one.
        df: (B,) of f(z).
        dg: (B,) of g.
    """

    entries: Tensor
    contracts: Tensor
    dz: Tensor
    df: Tensor
    dg: Tensor

    @classmethod
    def at_start(cls, state: State) -> "Secant":
        """Before the first step."""
        entries = _entries(state)
        nan = entries.new_full((len(entries),), math.nan)
        return cls(entries=entries, contracts=torch.ones_like(nan, dtype=torch.bool), dz=nan, df=nan, dg=nan)

    def after(self, state: State) -> "Secant":
        """The changes from the iterate of this one to ``state``."""
        entries = _entries(state)
        dz, df, dg = torch.linalg.vector_norm(entries - self.entries, dim=2).unbind(1)
        whole = entries.shape[2] == state.z.shape[1]
        contracts = self.contracts & (df <= (dz if whole else CHANCE * dz))
        return Secant(entries=entries, contracts=contracts, dz=dz, df=df, dg=dg)

    def error_ratio(self, of_image: Tensor) -> Tensor:
        """(B,) the error over the residual, of f(z) where ``of_image`` (B,), else of z."""
        return torch.where(of_image, self.df, self.dz) / self.dg


def _entries(state: State) -> Tensor:
    z, fz = state.z, state.fz
    stride = _prime_from(math.ceil(z.shape[1] / ENTRIES))
    if stride > 1:
        z, fz = z[:, ::stride], fz[:, ::stride]
    return torch.stack((z, fz, fz - z), dim=1)


def _prime_from(n: int) -> int:
    """The smallest prime that is at least n: regular states are then not read at the same place of each period."""
    while any(n % divisor == 0 for divisor in range(2, math.isqrt(n) + 1)):
        n += 1
    return n
