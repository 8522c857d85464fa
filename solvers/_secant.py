"""How the iterates of a solve change in a step, and what that says about the error."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers.methods.solver import State

# Entries of a sample that are looked at; ratios of norms need no more, and large states need not be read again.
ENTRIES = 128

# A step contracts if it changes images by at most so many times what it changes iterates by: less than once, because a
# smaller gain is not worth the risk that f expands in other directions; more if not all entries are looked at, which
# leaves room for chance.
CONTRACTION, CONTRACTION_OF_SOME = 0.98, 1.1


@dataclasses.dataclass(slots=True)
class Secant:
    """The changes of z, f(z) and g = f(z) - z in a step.

    Near a solution z*, g is (J - I)(z - z*), and the same matrices take changes to changes. So the error of z is to the
    residual what the change of z is to that of g, and the error of f(z) what the change of f(z) is to that of g, along
    the direction of the step.

    Attributes:
        dz: (B,) norm of the change of z.
        df: (B,) of f(z).
        dg: (B,) of g.
        contracts: (B,) bool, whether images came closer together than iterates.
    """

    dz: Tensor
    df: Tensor
    dg: Tensor
    contracts: Tensor

    @classmethod
    def between(cls, before: State, after: State) -> "Secant":
        """The changes from one state to another, over some of their entries where there are many."""
        size = before.z.shape[1]
        stride = _prime_from(math.ceil(size / ENTRIES))
        z, fz, old_z, old_fz = after.z, after.fz, before.z, before.fz
        if stride > 1:
            z, fz, old_z, old_fz = (tensor[:, ::stride] for tensor in (z, fz, old_z, old_fz))
        dz, df = z - old_z, fz - old_fz
        size_z, size_f, size_g = torch.linalg.vector_norm(torch.stack((dz, df, df - dz)), dim=2).unbind()
        contracts = size_f <= (CONTRACTION if stride == 1 else CONTRACTION_OF_SOME) * size_z
        return cls(size_z, size_f, size_g, contracts)

    def error_ratio(self, of_image: Tensor) -> Tensor:
        """(B,) the error over the residual, of f(z) where ``of_image`` (B,), else of z."""
        return torch.where(of_image, self.df, self.dz) / self.dg


def _prime_from(n: int) -> int:
    """The smallest prime that is at least n: regular states are then not read at the same place of each period."""
    while any(n % divisor == 0 for divisor in range(2, math.isqrt(n) + 1)):
        n += 1
    return max(n, 1)
