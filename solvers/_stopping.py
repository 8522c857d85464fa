"""When a sample of a solve is done."""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from solvers.problem.hyperparameters import Hyperparameters, require_positive_int
from solvers.problem.layout import Layout
from solvers.problem.norms import underflow

# The defaults of `solve`, in the place of which a Stopping comes.
RTOL, ATOL = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping(Hyperparameters):
    """When a sample has converged, and when there is no more hope for it.

    A sample has converged when

        norm(f(z) - z) <= atol + rtol * norm(f(z)),

    over all its entries, or, where a tolerance is given for each leaf of the state, in every leaf by itself. The
    residual that a solution reports is always that of the whole sample, ``norm(f(z) - z) / norm(f(z))``.

    Args:
        rtol: Relative tolerance; a number, or a pytree of numbers like the state. None counts as 0.
        atol: Absolute tolerance, in the units of the state; likewise.
        norm: "rms", the root mean square over the entries, so that ``atol`` does not depend on their number; "max", the
            largest absolute entry; or "l2", the Euclidean norm.
        patience: Steps in which the smallest residual of a sample does not improve before it counts as STAGNATED.
        max_growth: A sample counts as DIVERGED when ``norm(f(z) - z)`` is this many times what ``norm(f(z) - z) +
            norm(f(z))`` was at the start. The default is far above the transients of convergent iterations.

    Example:
        >>> import torch
        >>> from solvers import Stopping, solve
        >>> state = {"position": torch.zeros(2, 3), "mass": torch.ones(2)}
        >>> def f(z):
        ...     return {"position": 0.5 * z["position"] + 1, "mass": 0.5 * torch.cos(z["mass"])}
        >>> stopping = Stopping(rtol={"position": 1e-3, "mass": 1e-6}, atol=0, norm="max")
        >>> solve(f, state, stopping=stopping).converged
        tensor([True, True])
    """

    rtol: Any = RTOL
    atol: Any = ATOL
    norm: Literal["rms", "max", "l2"] = "rms"
    patience: int = 50
    max_growth: float = 1e6

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "max", "l2"):
            raise ValueError(f'Stopping(norm=...) must be "rms", "max" or "l2", got {self.norm!r}.')
        for name in ("rtol", "atol"):
            for leaf in tree_flatten(getattr(self, name))[0]:
                if leaf is not None and not (isinstance(leaf, (int, float)) and leaf >= 0):
                    raise ValueError(f"{name} must be a number >= 0 or None, or a pytree of such, got {leaf!r}.")
        require_positive_int(self, "patience", self.patience)
        if not self.max_growth > 1:
            raise ValueError(f"Stopping(max_growth=...) must be a number > 1, got {self.max_growth!r}.")

    def flattened(self, spec: TreeSpec) -> "Stopping":
        """The same for the list of the leaves of a state of this structure.

        Raises:
            ValueError: A tolerance is a pytree of another structure.
        """
        return dataclasses.replace(
            self, rtol=_flattened(self.rtol, spec, "rtol"), atol=_flattened(self.atol, spec, "atol")
        )


def _flattened(tolerance: Any, spec: TreeSpec, name: str) -> float | list[float]:
    """A number for the whole state, or one for each leaf."""
    leaves, found = tree_flatten(tolerance)
    numbers = [float(leaf or 0.0) for leaf in leaves]
    if found.is_leaf():
        return numbers[0]
    if found != spec:
        raise ValueError(
            f"{name} must be a number or have the structure of the state: got {found} for a state of structure {spec}."
        )
    return numbers


def get_stopping(rtol: Any, atol: Any, stopping: Stopping | None) -> Stopping | None:
    """The stopping test that these options of a solve ask for; None for a fixed number of steps."""
    if stopping is None:
        return None if rtol is None and atol is None else Stopping(rtol=rtol, atol=atol)
    if not isinstance(stopping, Stopping):
        raise TypeError(f"stopping must be a solvers.Stopping or None, got {stopping!r}.")
    if (rtol, atol) != (RTOL, ATOL):
        raise ValueError(
            f"Give the tolerances to Stopping or to the solve, not to both: got rtol={rtol!r}, atol={atol!r} and "
            f"{stopping!r}."
        )
    return stopping


class Measure:
    """The norms and bounds of a :class:`Stopping`, for states of one layout.

    A part is what has a tolerance of its own: the whole sample, or each leaf of the state. Norms of parts are (B,) for
    the one, (B, parts) for the other, and plain: for "rms" the root of the size is in ``atol``, which spares a division
    a step.
    """

    def __init__(self, stopping: Stopping, layout: Layout) -> None:
        self._ord = math.inf if stopping.norm == "max" else 2
        size = sum(layout.sizes)
        self._unit = math.sqrt(max(size, 1)) if stopping.norm == "rms" else 1.0
        flat = stopping.flattened(layout.spec)
        rtol, atol = flat.rtol, flat.atol
        self._sizes = layout.sizes if isinstance(rtol, list) or isinstance(atol, list) else None
        self._rtol: float | Tensor
        self._atol: float | Tensor
        if isinstance(rtol, float) and isinstance(atol, float):
            self._rtol, self._atol = rtol, atol * self._unit
        else:
            ones = torch.ones(len(layout.sizes), dtype=layout.dtype, device=layout.device)
            sizes = torch.tensor(layout.sizes).to(ones)
            self._rtol = ones * ones.new_tensor(rtol)
            self._atol = ones * ones.new_tensor(atol) * (sizes.sqrt() if stopping.norm == "rms" else 1.0)

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
        """(B, D) -> (B,) the norm of the whole as the user chose it."""
        return self.whole(self.parts(x)) / self._unit

    def exceeds(self, error: Tensor, scale: Tensor) -> Tensor:
        """(B,) bool: whether a part of ``error`` is above its bound, given the norms of the parts; False for nan."""
        above = error > self._bound(scale)
        return above if self._sizes is None else above.any(dim=1)

    def met(self, error: Tensor, scale: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        """(B,) bool: whether all parts of ``error`` are within their bounds, and these mean something.

        Norms whose squares overflow or underflow compare as they should not.
        """
        bound = self._bound(scale)
        met = (error <= bound) & bound.isfinite()
        sound = scale > underflow(scale)
        if not bool(sound.all()):
            same = (fz == z).split(self._sizes or [z.shape[1]], dim=1)
            met = met & (sound | torch.stack([column.all(dim=1) for column in same], dim=1).view_as(sound))
        return met if self._sizes is None else met.all(dim=1)

    def _bound(self, scale: Tensor) -> Tensor:
        bound = self._rtol * scale
        return bound + self._atol if isinstance(self._atol, Tensor) or self._atol else bound
