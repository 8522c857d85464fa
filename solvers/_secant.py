"""How the iterates of a solve change in a step, and what that says about the error."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from solvers.methods.solver import State
from solvers.problem import all_of
from solvers.problem.norms import underflow, vanishing

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
        most: (B,) the largest ``df`` of a step that brings images closer together than iterates.
    """

    dz: Tensor
    df: Tensor
    dg: Tensor
    most: Tensor

    @classmethod
    def between(cls, before: State, after: State, *, complete: bool, contracts: bool) -> "Secant":
        """The changes from one state to another, whose entries are all there or, if not ``complete``, some.

        Every step counts as contracting if ``contracts``.
        """
        dz, df = after.z - before.z, after.fz - before.fz
        size_z, size_f, size_g = (torch.linalg.vector_norm(change, dim=1) for change in (dz, df, df - dz))
        most = math.inf if contracts else CONTRACTION if complete else CONTRACTION_OF_SOME
        return cls(size_z, size_f, size_g, torch.full_like(size_z, most) if contracts else most * size_z)

    def error_ratio(self, of_image: Tensor) -> Tensor:
        """(B,) the error over the residual, of f(z) where ``of_image`` (B,), else of z."""
        return torch.where(of_image, self.df, self.dz) / self.dg

    def shows_a_digit(self, rounded: Tensor, scale: Tensor, start_size: Tensor, slack: Tensor | None) -> Tensor:
        """(B,) bool: whether the error that the step shows is below a tenth of the value's size or the start's.

        Args:
            rounded: (B,) the residual with what rounding in f may hide.
            scale: (B,) the size of the value.
            start_size: (B,) that of the start.
            slack: (B,) how many times the residual of a root fits into its bound, which the error must meet as well;
                None for what is no root.
        """
        # Where squares lose digits to underflow, norms tell nothing.
        tenfold = torch.add(10 * underflow(rounded), rounded, alpha=10)
        near = tenfold * self.df.clamp_min(vanishing(rounded)) < torch.maximum(scale, start_size) * self.dg
        return near if slack is None else all_of(near, self.dz <= slack * self.dg)


def some_entries(state: State, stride: int | None = None) -> State:
    """A view of the state with some of its entries where there are many, else the state itself.

    Args:
        state: The state.
        stride: The distance of the entries, if it is known: :func:`stride_of` the number of entries.
    """
    stride = stride_of(state.z.shape[1]) if stride is None else stride
    return state if stride == 1 else State(state.z[:, ::stride], state.fz[:, ::stride])


@functools.cache
def stride_of(size: int) -> int:
    """The distance of the entries that are looked at: a prime, so that regular states are read at all phases."""
    stride = math.ceil(size / ENTRIES)
    while any(stride % divisor == 0 for divisor in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return max(stride, 1)
