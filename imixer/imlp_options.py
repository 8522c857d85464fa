"""The options of an iMLP: the one place where each has its name, type, default, meaning and range.

:class:`imixer.IMLP`, :class:`imixer.IMixer`, the models that timm creates, the flags of training and the tables of the
documentation take the options from here.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from implicit import Backward
from solvers import Solver

Norm = Literal["spectral", "none", "batch", "batch_per_step", "weight"]
HiddenSolve = Literal["nested", "joint"]
Contraction = Literal["paper", "certified"]

AnyClass = TypeVar("AnyClass", bound=type)


class Requirement(NamedTuple):
    """What a value has to be: in words, and as a test."""

    words: str
    is_met_by: Callable[[Any], bool]


POSITIVE_INTEGER = Requirement("a positive integer", lambda value: type(value) is int and value >= 1)
POSITIVE_NUMBER = Requirement(
    "a positive number",
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf,
)
TOLERANCE = Requirement(
    "a number >= 0 or None",
    lambda value: (
        value is None or (isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf)
    ),
)
TRUE_OR_FALSE = Requirement("True or False", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class Option:
    """What the declaration of an option says besides its name and type.

    Attributes:
        default: Its value if it is not given.
        meaning: What it does, for the documentation and the list of flags.
        requirement: What a value has to be; None where the type lists the values, or where using the value checks it.
    """

    default: Any
    meaning: str
    requirement: Requirement | None = None


class SolverChanges(TypedDict, total=False):
    """The options that say how an iMLP solves for its fixed point. They can be changed after training."""

    n_iter: Annotated[int, Option(2, "number of solver steps; with rtol, the largest number", POSITIVE_INTEGER)]
    solver: Annotated[Solver | str, Option("picard", "fixed-point solver or its name: picard, anderson, broyden, ...")]
    backward: Annotated[
        Backward | str, Option("unrolled", "backward mode or its name: unrolled, implicit, phantom, jfb, ...")
    ]
    rtol: Annotated[
        float | None,
        Option(None, "relative tolerance that ends a solve; without it, a solve takes exactly n_iter steps", TOLERANCE),
    ]


class IMLPOptions(SolverChanges, total=False):
    """The options of an :class:`imixer.IMLP`, any of which may be left out."""

    h_ratio: Annotated[
        float, Option(2.0, "width of the inner hidden layers as a multiple of the state's width", POSITIVE_NUMBER)
    ]
    n_power: Annotated[
        int, Option(8, "power iterations of the spectral normalization per training step", POSITIVE_INTEGER)
    ]
    coeff: Annotated[
        float,
        Option(
            0.9,
            "upper bound on the spectral norms inside the map, or on its Lipschitz constant if that is certified",
            POSITIVE_NUMBER,
        ),
    ]
    hidden_layers: Annotated[
        int, Option(2, "number of hidden layers: 1 is MLP-Mixer, and 2 is the paper's model", POSITIVE_INTEGER)
    ]
    hidden_solve: Annotated[
        HiddenSolve,
        Option("nested", "how three or more hidden layers are solved for: by a solve inside each solve, or jointly"),
    ]
    tied: Annotated[
        bool, Option(False, "use symmetric couplings, for which the Hopfield network has an energy", TRUE_OR_FALSE)
    ]
    norm: Annotated[Norm, Option("spectral", "normalization inside the map")]
    contraction: Annotated[
        Contraction,
        Option("paper", "how the map is bounded: as in the paper, or so that it is certain to contract by coeff"),
    ]


def _declared(options: type) -> dict[str, Option]:
    hints = get_type_hints(options, include_extras=True)
    return {name: cast(Option, hint.__metadata__[0]) for name, hint in hints.items()}


IMLP_OPTIONS = _declared(IMLPOptions)
SOLVER_OPTIONS = _declared(SolverChanges)
_TYPES = get_type_hints(IMLPOptions)

IMLPOptions.__doc__ = "\n".join(
    [
        f"{IMLPOptions.__doc__}\n\nAttributes:",
        *(f"    {name}: {option.meaning} (default {option.default!r})." for name, option in IMLP_OPTIONS.items()),
    ]
)


def choices(name: str) -> tuple[str, ...]:
    """The values that an option may have, if its type lists them; else nothing."""
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def check_names(taker: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError that lists the known names if one of the given names is not among them."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(
                f"{taker} got an unexpected keyword argument {name!r}{hint} The keyword arguments are "
                f"{', '.join(known)}."
            )


def complete(given: IMLPOptions) -> IMLPOptions:
    """The given options, each checked by itself, and the defaults of the others.

    Raises:
        ValueError: A value is not what the option requires.
    """
    options = {name: option.default for name, option in IMLP_OPTIONS.items()} | dict(given)
    for name, value in options.items():
        values, requirement = choices(name), IMLP_OPTIONS[name].requirement
        if values and value not in values:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}.")
        if requirement is not None and not requirement.is_met_by(value):
            raise ValueError(f"{name} must be {requirement.words}, got {value!r}.")
    return cast(IMLPOptions, options)


def lists_options(cls: AnyClass) -> AnyClass:
    """A class decorator: ``inspect.signature`` and ``help`` list the options instead of the constructor's ``**``."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_TYPES[name])
        for name, option in IMLP_OPTIONS.items()
    ]
    cls.__init__.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[misc]
    return cls
