"""When a solve stops: the one value that says so, and the norms and bounds that follow from it."""

import copy
import dataclasses
import enum
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from solvers.problem import Hyperparameters, Layout, require_positive_int


class NotGiven(enum.Enum):
    """The type of the default of an option whose absence means something other than None."""

    NOT_GIVEN = enum.auto()

    def __repr__(self) -> str:
        return self.name


NOT_GIVEN = NotGiven.NOT_GIVEN

# A number for the whole state, or a pytree of numbers like the state. Any, because a pytree has no static type.
Tolerance = Any


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Stopping(Hyperparameters):
    """When a sample has converged, and when to declare stagnation or divergence.

    A sample has converged when

        norm(f(z) - z) <= atol + rtol * norm(f(z)),

    over all of its entries or, where a tolerance is given for each leaf of the state, in every leaf by itself, and when
    at least one digit of the value is right: the error, as the last two tested iterates estimate it, is below a tenth
    of the size of the value or of the start; and if the value has grown tenfold, the residual has fallen tenfold since.
    The first condition alone also holds for an iterate that has run away. The start, whose
    residual says nothing about its error, has converged if the residual is a hundredth of the bound or less.

    The residual that a solution reports is always that of the whole sample, ``norm(f(z) - z) / norm(f(z))``.

    Args:
        rtol: Relative tolerance; a number, or a pytree of numbers like the state. None counts as 0; without ``atol``,
            it means that nothing is tested, as in :class:`Steps`.
        atol: Absolute tolerance, in the units of the state; likewise. If it is not given, it is
            ``rtol * sqrt(eps) * size``, where eps is the rounding unit of the solver's dtype and size the larger one of
            ``norm(z0)`` and ``norm(f(z0))``. So the test does not depend on the units of the state, and solutions at
            zero are found as well.
        norm: "rms", the root mean square over the entries, so that ``atol`` does not depend on their number; "max", the
            largest absolute entry; or "l2", the Euclidean norm.
        max_steps: The largest number of steps. The call of ``f`` at ``z0`` is the first.
        check_every: Test at every so many steps (and the first and the last) instead of at each. Between tests nothing
            waits for the device. A sample may take up to ``check_every - 1`` steps more than it needs.
        patience: A sample is STAGNATED when ``norm(f(z) - z)`` has reached no new minimum for so many steps.
        max_growth: A sample is DIVERGED when ``norm(f(z) - z)`` is this many times the sum of ``norm(f(z) - z)`` and
            ``norm(f(z))`` at the start. The default is far above the transients of convergent iterations, and above the
            growth on the way from a start close to an unstable fixed point.

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

    rtol: Tolerance = 1e-4
    atol: Tolerance = NOT_GIVEN
    norm: Literal["rms", "max", "l2"] = "rms"
    max_steps: int = 50
    check_every: int = 1
    patience: int = 50
    max_growth: float = 2e9

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "max", "l2"):
            raise ValueError(f'Stopping(norm=...) must be "rms", "max" or "l2", got {self.norm!r}.')
        for name in ("rtol", "atol"):
            for leaf in tree_flatten(getattr(self, name))[0]:
                if leaf is not None and leaf is not NOT_GIVEN and not _is_tolerance(leaf):
                    raise ValueError(f"{name} must be a number >= 0 or None, or a pytree of such, got {leaf!r}.")
        _require_max_steps(self.max_steps)
        require_positive_int(self, "check_every", self.check_every)
        require_positive_int(self, "patience", self.patience)
        if not self.max_growth > 1:
            raise ValueError(f"Stopping(max_growth=...) must be a number > 1, got {self.max_growth!r}.")

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name in ("rtol", "max_steps")
        ]
        return f"Stopping({', '.join(shown)})"

    def __hash__(self) -> int:
        # Pytrees of tolerances are not hashable; their leaves are.
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(tuple(part for field in fields for part in _hashable(field)))

    @property
    def relative(self) -> float | None:
        """The smallest positive relative tolerance, or None if there is none."""
        return min((float(leaf) for leaf in tree_flatten(self.rtol)[0] if leaf), default=None)

    @property
    def tolerances(self) -> str:
        """The tolerances that were given, for messages."""
        given = {"rtol": self.rtol, "atol": self.atol}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not NOT_GIVEN)

    def flattened(self, spec: TreeSpec) -> "Stopping":
        """The same for the list of the leaves of a state of this structure.

        Raises:
            ValueError: A tolerance is a pytree of another structure.
        """
        if all(tolerance is NOT_GIVEN or type(tolerance) in (int, float) for tolerance in (self.rtol, self.atol)):
            return self
        return dataclasses.replace(
            self, rtol=_flattened(self.rtol, spec, "rtol"), atol=_flattened(self.atol, spec, "atol")
        )


@dataclasses.dataclass(frozen=True)
class Steps:
    """Take a fixed number of steps and test nothing.

    No residual is computed and nothing is copied to the host, so the solve compiles to one graph. Every sample has the
    status UNTESTED. n steps of :class:`solvers.Picard` are exactly n calls of ``f``, and the last one's result is the
    value.

    Args:
        n: The number of steps. The call of ``f`` at ``z0`` is the first.

    Example:
        >>> import torch
        >>> from solvers import Steps, solve
        >>> solve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), "picard", stopping=Steps(3)).value
        tensor([[1.7500]])
    """

    n: int

    def __post_init__(self) -> None:
        _require_max_steps(self.n)

    @property
    def max_steps(self) -> int:
        """The number of steps."""
        return self.n

    def flattened(self, spec: TreeSpec) -> "Steps":
        """The same: there is nothing in it that depends on the structure of the state."""
        return self


StopRule = Stopping | Steps


def stop_rule(
    stopping: StopRule | None = None,
    *,
    rtol: Tolerance = NOT_GIVEN,
    atol: Tolerance = NOT_GIVEN,
    max_steps: int | NotGiven = NOT_GIVEN,
    check_every: int | NotGiven = NOT_GIVEN,
    default: StopRule | None = None,
) -> StopRule:
    """The one value that says when a solve stops, from that value or its shorthand.

    Args:
        stopping: The value, or None.
        rtol: Shorthand for a field of :class:`Stopping`, as are the next ones.
        atol: Excludes ``stopping``, as does ``rtol``: two places for the tolerances would contradict each other.
        max_steps: Goes with both.
        check_every: Goes with both.
        default: What is changed by the shorthand where there is no ``stopping``; ``Stopping()`` if it is None.

    Raises:
        TypeError: ``stopping`` is something else.
        ValueError: An option is not valid, or tolerances are given twice.
    """
    given = {"rtol": rtol, "atol": atol, "max_steps": max_steps, "check_every": check_every}
    given = {name: value for name, value in given.items() if value is not NOT_GIVEN}
    if stopping is not None:
        if not isinstance(stopping, (Stopping, Steps)):
            raise TypeError(
                f"stopping must be a solvers.Stopping or None, got {stopping!r}. For a fixed number of steps it is "
                "solvers.Steps(n)."
            )
        tolerances = [name for name in ("rtol", "atol") if name in given]
        if tolerances:
            raise ValueError(
                f"Give the tolerances to Stopping or to the solve, not to both: got {tolerances[0]}="
                f"{given[tolerances[0]]!r} and {stopping!r}."
            )
    base = stopping or default or Stopping()
    if isinstance(base, Steps):
        if all(value is None for name, value in given.items() if name in ("rtol", "atol")):
            return Steps(given.get("max_steps", base.n))
        # Tolerances given to a call of a layer with a fixed number of steps.
        given.setdefault("max_steps", base.n)
        base = Stopping()
    rule = dataclasses.replace(base, **given) if given else base
    return Steps(rule.max_steps) if rule.rtol is None and rule.atol in (None, NOT_GIVEN) else rule


class Measure:
    """The norms and bounds of a :class:`Stopping`, for states of one layout.

    A part is what has a tolerance of its own: the whole sample, or each leaf of the state. Norms of parts are (B,) in
    the first case, (B, parts) in the second, and plain: for "rms" the square root of the size is in ``atol``, which
    spares a division per step.

    Args:
        stopping: The tolerances.
        layout: The layout of the state.
        unit_of: Gives the size (B,) of a state that belongs to an absolute tolerance of 1, when the first step is done;
            None where the problem is no root: then it is 1. The map of a root is ``z - c F(z)`` with a c that is right
            at the start only, so that the error that the last step shows has to be within the bound as well.
        newton_step: Gives Newton's step (B, D) at iterates of a root (B, D), which has to be within the bound too: the
            last step tells nothing of the error in other directions. None where that is known, or expensive.
    """

    def __init__(
        self,
        stopping: Stopping,
        layout: Layout,
        unit_of: Callable[[], Tensor | None] | None = None,
        newton_step: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._unit_of = unit_of
        self._newton_step = newton_step
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
    def asks_newton_step(self) -> bool:
        """Whether a root has to be confirmed by Newton's step."""
        return self._newton_step is not None

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
        """What two measures share, apart from their numbers, that compute alike."""
        return self._ord, self._sizes is None, self._of_start is None, self._unit_of is None

    def for_unit(self, unit: Tensor | None) -> "Measure":
        """The same for a root whose absolute tolerance of 1 belongs to states of the size ``unit`` (B,)."""
        other = copy.copy(self)
        other._unit_of = None if unit is None else (lambda: unit)
        return other

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

    def absolute(self, start: Tensor) -> Tensor:
        """The absolute tolerance of each part, given the plain norms of the parts at the start."""
        if self._of_start is None:
            unit = None if self._unit_of is None else self._unit_of()
            return torch.zeros_like(start) + (self._atol if unit is None else self._in_state(unit))
        return self._of_start * start

    def _in_state(self, unit: Tensor) -> Tensor:
        """The absolute tolerance for each sample whose unit is another one (B,)."""
        return unit * self._atol if self._sizes is None else unit.unsqueeze(1) * self._atol

    def sizes_at_start(self, z: Tensor, scales: Tensor) -> Tensor:
        """The sizes of the parts at the start z (B, D), given the plain norms of f(z)."""
        sizes = self.parts(z)
        starts = torch.maximum(sizes, scales)
        if self._unit_of is None:
            return starts
        # The first step towards a root may be too long to tell anything.
        return torch.where(sizes > 0, torch.minimum(starts, 10 * sizes), starts)

    def slack(self, errors: Tensor, scales: Tensor, absolute: Tensor) -> Tensor | None:
        """(B,) how many times the error of each part fits into its bound at least; None for what is no root."""
        if self._unit_of is None:
            return None
        slack = self.bound(scales, absolute) / errors
        return slack if self._sizes is None else slack.amin(dim=1)

    def confirmed(self, met: Tensor, z: Tensor, scale: Tensor, start: Tensor, absolute: Tensor) -> Tensor:
        """(B,) bool: which of the samples ``met`` (B,) have converged by Newton's step as well, if it is asked.

        Args:
            met: The samples that have converged by all other tests.
            z: (B, D) the iterates.
            scale: Plain norms of the parts of f(z).
            start: (B, D) where the others are, which are of no interest.
            absolute: The absolute tolerances.
        """
        if self._newton_step is None or not bool(met.any()):
            return met
        error = self.parts(self._newton_step(torch.where(met.unsqueeze(1), z, start)))
        bound, error = self.compared(self.bound(scale, absolute), error)
        return met & (bound >= error)

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


def _is_tolerance(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) >= 0


def _require_max_steps(value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"max_steps must be a positive integer, got {value!r}.")


def _hashable(field: Any) -> tuple[Hashable, ...]:
    leaves, spec = tree_flatten(field)
    return (*leaves, str(spec))


def _flattened(tolerance: Any, spec: TreeSpec, name: str) -> Any:
    """A number for the whole state, or a list with one for each leaf; NOT_GIVEN stays."""
    if tolerance is NOT_GIVEN:
        return tolerance
    leaves, found = tree_flatten(tolerance)
    values = [float(leaf or 0.0) for leaf in leaves]
    if found.is_leaf():
        return values[0]
    if found != spec:
        raise ValueError(
            f"{name} must be a number or have the structure of the state: got {found} for a state of structure {spec}."
        )
    return values
