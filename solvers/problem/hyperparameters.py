"""The base of every options object: a misspelled option is a TypeError that lists the valid ones."""

import dataclasses
import numbers
import operator
from typing import Any, ClassVar, Self

import torch

from solvers.problem.foreign_names import hint


class Hyperparameters:
    """Base of the frozen, keyword-only dataclasses that hold hyperparameters (solvers, backward modes).

    The check is in ``__new__`` because a dataclass writes its own ``__init__``, whose message names the unknown option
    but not the ones that exist.
    """

    # Of each class by itself, found when it is first used.
    _option_names: ClassVar[list[str]]
    # Options that do not belong to the object but to the solve that it is given to, for messages.
    options_of_solves: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(
                f"{cls.__name__} is not a dataclass. Put @dataclasses.dataclass(frozen=True, kw_only=True) above it."
            )
        names = cls.__dict__.get("_option_names")
        if names is None:
            # Not by dataclasses.fields, which torch.compile does not trace.
            fields = cls.__dataclass_fields__.values()
            names = [field.name for field in fields if field.init and "ClassVar" not in str(field.type)]
            if not torch.compiler.is_compiling():
                cls._option_names = names
        known = ", ".join(names) or "none"
        if args:
            raise TypeError(f"{cls.__name__} takes keyword arguments only, got {args!r}. Its options: {known}.")
        for option in options:
            if option not in names:
                ours = hint(option, names, cls.options_of_solves)
                raise TypeError(f"{cls.__name__} has no option {option!r}.{ours} Its options: {known}.")
        return super().__new__(cls)


def require_positive_int(
    owner: object, name: str, value: object, *, optional: bool = False, least: int = 1
) -> int | None:
    """Raise a ValueError naming ``owner`` and the option unless ``value`` is an integer >= ``least``.

    An integer of another package, such as ``np.int64(5)``, is accepted, and stored as an int if ``owner`` is a
    :class:`Hyperparameters`. A bool is not an integer here.

    Args:
        owner: The object that has the option.
        name: The option.
        value: Its value.
        optional: Whether None is accepted.
        least: The smallest accepted value.

    Returns:
        The value as an int, or None.
    """
    if optional and value is None:
        return None
    or_none = " or None" if optional else ""
    number = checked_int(f"{type(owner).__name__}({name}=...)", value, least=least, or_else=or_none)
    _store(owner, name, value, number)
    return number


def checked_int(name: str, value: object, *, least: int = 1, or_else: str = "") -> int:
    """``value`` as an int; a ValueError that begins with ``name`` unless it is an integer >= ``least``, and no bool.

    ``or_else`` is what the message says of other values that the caller accepts.
    """
    number = as_int(value)
    if number is None or number < least:
        allowed = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{name} must be {allowed}{or_else}, got {value!r}.")
    return number


def require_damping(owner: object, value: object) -> float:
    """Raise a ValueError unless the option ``damping`` of ``owner`` is a number in (0, 1]; returns it as a float.

    A number of another package, such as ``np.float32(0.5)``, is accepted, and stored as a float if ``owner`` is a
    :class:`Hyperparameters`.
    """
    number = as_float(value)
    if number is None or not 0.0 < number <= 1.0:
        raise ValueError(
            f"{type(owner).__name__}(damping=...) must be in (0, 1], got {value!r}. 1 is the undamped step."
        )
    _store(owner, "damping", value, number)
    return number


def require_positive(owner: object, name: str, value: object, *, optional: bool = False) -> float | None:
    """Raise a ValueError unless the option is a number > 0; returns it as a float, and stores it as above."""
    if optional and value is None:
        return None
    number = as_float(value)
    if number is None or not number > 0.0:
        allowed = "a positive number or None" if optional else "a positive number"
        raise ValueError(f"{type(owner).__name__}({name}=...) must be {allowed}, got {value!r}.")
    _store(owner, name, value, number)
    return number


def as_int(value: object) -> int | None:
    """The integer ``value`` of any type as an int; None for anything else, bools included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return operator.index(value)


def as_float(value: object) -> float | None:
    """The real number ``value`` of any type as a float; None for anything else, bools included."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)


def _store(owner: object, name: str, value: object, number: float) -> None:
    """Replace an option that was given in another type, so that the owner prints, compares and computes as usual."""
    if type(value) is not type(number) and isinstance(owner, Hyperparameters):
        object.__setattr__(owner, name, number)
