"""When a solve stops: the one value that says so."""

import dataclasses
import enum
import numbers
from collections.abc import Hashable
from typing import Any, Literal

from torch.utils._pytree import TreeSpec, tree_flatten

from solvers.problem import Hyperparameters, checked_int, require_positive_int


class NotGiven(enum.Enum):
    """The type of the default of an option whose absence means something other than None."""

    NOT_GIVEN = enum.auto()

    def __repr__(self) -> str:
        return self.name


NOT_GIVEN = NotGiven.NOT_GIVEN


class _Default(float):
    """A tolerance that nobody gave: a solve may ask for less."""


DEFAULT_RTOL = _Default(1e-4)

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
            it means that nothing is tested, as in :class:`Steps`. If it is not given, it is 1e-4, or the rounding unit
            eps of the map where that is larger: 1e-3 in float16 and 8e-3 in bfloat16, also under autocast.
        atol: Absolute tolerance, in the units of the state; likewise. If it is not given, it is
            ``rtol * sqrt(eps) * size``, where eps is the rounding unit of the solver's dtype and size the larger one of
            ``norm(z0)`` and ``norm(f(z0))``, but at most ten times ``norm(z0)`` if that is not 0. So the test does not
            depend on the units of the state, and solutions at zero are found as well.
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

    rtol: Tolerance = DEFAULT_RTOL
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
        object.__setattr__(self, "max_steps", checked_int("max_steps", self.max_steps))
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

    def resolved(self, eps: float) -> "Stopping":
        """The same for a map of rounding unit ``eps``, which may be larger than the default tolerance."""
        return dataclasses.replace(self, rtol=eps) if isinstance(self.rtol, _Default) and eps > self.rtol else self

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
        object.__setattr__(self, "n", checked_int("max_steps", self.n))

    @property
    def max_steps(self) -> int:
        """The number of steps."""
        return self.n

    def resolved(self, eps: float) -> "Steps":
        """The same: no tolerance is tested."""
        return self

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
    base = stopping or default or _DEFAULT
    if isinstance(base, Steps):
        if all(value is None for name, value in given.items() if name in ("rtol", "atol")):
            return Steps(given.get("max_steps", base.n))
        # Tolerances given to a call of a layer with a fixed number of steps.
        given.setdefault("max_steps", base.n)
        base = _DEFAULT
    rule = dataclasses.replace(base, **given) if given else base
    return Steps(rule.max_steps) if rule.rtol is None and rule.atol in (None, NOT_GIVEN) else rule


def _is_tolerance(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) >= 0


def _hashable(field: Any) -> tuple[Hashable, ...]:
    leaves, spec = tree_flatten(field)
    return (*leaves, str(spec))


def _flattened(tolerance: Any, spec: TreeSpec, name: str) -> Any:
    """A number for the whole state, or a list with one for each leaf; NOT_GIVEN stays."""
    if tolerance is NOT_GIVEN or isinstance(tolerance, _Default):
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


# What is meant where nothing is given.
_DEFAULT = Stopping()
