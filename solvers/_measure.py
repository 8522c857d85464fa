"""The norms and bounds that follow from a :class:`solvers.Stopping`, for states of one layout."""

import copy
import math
from collections.abc import Hashable

import torch
from torch import Tensor

from solvers._stopping import NOT_GIVEN, Stopping
from solvers.problem import Layout


class Measure:
    """The norms and bounds of a :class:`Stopping`, for states of one layout.

    A part is what has a tolerance of its own: the whole sample, or each leaf of the state. Norms of parts are (B,) in
    the first case, (B, parts) in the second, and plain: for "rms" the square root of the size is in ``atol``, which
    spares a division per step.

    Args:
        stopping: The tolerances.
        layout: The layout of the state.
        root: Whether the state is a root. The map is then ``z - c F(z)`` with a c that is right at the start only, so
            that the error that the last step shows has to be within the bound as well.

    Attributes:
        of_root: Whether the state is a root.
    """

    def __init__(self, stopping: Stopping, layout: Layout, *, root: bool = False) -> None:
        self.of_root = root
        self._ord = math.inf if stopping.norm == "max" else 2
        size = sum(layout.sizes)
        self._unit = math.sqrt(max(size, 1)) if stopping.norm == "rms" else 1.0
        flat = stopping.flattened(layout.spec)
        rtol, atol = flat.rtol, flat.atol
        derived = atol is NOT_GIVEN
        eps = torch.finfo(layout.dtype).eps
        atol = 0.0 if derived else atol
        self._sizes = layout.sizes if isinstance(rtol, list) or isinstance(atol, list) else None
        self._rtol: float | Tensor = 0.0
        self._atol: float | Tensor = 0.0
        if self._sizes is None:
            self._rtol, self._atol = float(rtol), atol * self._unit
        else:
            ones = torch.ones(len(layout.sizes), dtype=layout.dtype, device=layout.device)
            sizes = torch.tensor(layout.sizes).to(ones)
            self._rtol = ones * ones.new_tensor(rtol)
            self._atol = ones * ones.new_tensor(atol) * (sizes.sqrt() if stopping.norm == "rms" else 1.0)
        # The smallest relative tolerance of the whole sample; none is known where leaves have their own.
        self.least_rtol = self._rtol if isinstance(self._rtol, float) else 0.0
        self._of_start: float | Tensor | None = self._rtol * math.sqrt(eps) if derived else None

    @property
    def is_of_whole(self) -> bool:
        """Whether the whole sample is the only part."""
        return self._sizes is None

    def with_tensors(self, like: Tensor) -> "Measure":
        """The same with tensors () for its numbers, on the device of ``like``, so that others need no other code."""
        other = copy.copy(self)
        for name in ("_rtol", "_atol", "_of_start"):
            number = getattr(self, name)
            if isinstance(number, float):
                setattr(other, name, torch.full((), number, dtype=like.dtype, device=like.device))
        return other

    @property
    def kind(self) -> Hashable:
        """What two measures share, apart from their tolerances, that compute alike."""
        return self._ord, self._unit, self._sizes is None, self._of_start is None, self.of_root

    @property
    def needs_unit(self) -> bool:
        """Whether :meth:`absolute` depends on the unit of a root."""
        return self.of_root and self._of_start is None

    def parts(self, x: Tensor) -> Tensor:
        """(B, D) -> plain norms of the parts."""
        if self._sizes is None:
            whole: Tensor = torch.linalg.vector_norm(x, self._ord, dim=1)
            return whole
        columns = x.split(self._sizes, dim=1)
        return torch.stack([torch.linalg.vector_norm(column, self._ord, dim=1) for column in columns], dim=1)

    def whole(self, parts: Tensor) -> Tensor:
        """Norms of the parts -> (B,) that of the whole."""
        if self._sizes is None:
            return parts
        norm: Tensor = torch.linalg.vector_norm(parts, self._ord, dim=1)
        return norm

    def norm(self, x: Tensor) -> Tensor:
        """(B, D) -> (B,) the norm of the whole, in the units of the user's choice."""
        return self.in_units(self.whole(self.parts(x)))

    def in_units(self, norms: Tensor) -> Tensor:
        """Plain norms of the whole -> those of the user's choice."""
        return norms / self._unit

    def absolute(self, start: Tensor, unit: Tensor | None) -> Tensor:
        """The absolute tolerance of each part.

        Args:
            start: Plain norms of the parts at the start.
            unit: (B,) the size of a state that belongs to an absolute tolerance of 1; None where that is 1.
        """
        if self._of_start is None:
            return torch.zeros_like(start) + (self._atol if unit is None else self._in_state(unit))
        return self._of_start * start

    def _in_state(self, unit: Tensor) -> Tensor:
        """The absolute tolerance for each sample whose unit is another one (B,)."""
        return unit * self._atol if self._sizes is None else unit.unsqueeze(1) * self._atol

    def sizes_at_start(self, z: Tensor, scales: Tensor) -> Tensor:
        """The sizes of the parts at the start z (B, D), given the plain norms of f(z)."""
        sizes = self.parts(z)
        starts = torch.maximum(sizes, scales)
        # A first step that leads far away tells nothing of the solution, such as that of z + a / z near zero.
        return torch.where(sizes > 0, torch.minimum(starts, 10 * sizes), starts)

    def slack(self, errors: Tensor, bound: Tensor) -> Tensor | None:
        """(B,) how many times the error of each part fits into its bound at least; None for what is no root."""
        if not self.of_root:
            return None
        slack = bound / errors
        return slack if self._sizes is None else slack.amin(dim=1)

    def bound(self, scale: Tensor, absolute: Tensor) -> Tensor:
        """The bound on the residual of each part, given plain norms of f(z) and the absolute tolerances."""
        if isinstance(self._rtol, Tensor):
            return torch.addcmul(absolute, scale, self._rtol)
        return torch.add(absolute, scale, alpha=self._rtol)

    def compared(self, bound: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B,), the first of which is at least the second where every part of ``error`` is within its bound."""
        if self._sizes is None:
            return bound, error
        least = (bound - error).amin(dim=1)
        return least, torch.zeros_like(least)
