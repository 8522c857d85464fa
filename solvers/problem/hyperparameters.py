"""The base of every options object: a misspelled option is a TypeError that lists the valid ones."""

import dataclasses
import difflib
from typing import Any, Self


class Hyperparameters:
    """Base of the frozen, keyword-only dataclasses that hold hyperparameters (solvers, backward modes).

    The check lives in ``__new__`` because a dataclass writes its own ``__init__``, whose message names the unknown
    option but not the ones that exist.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(
                f"{cls.__name__} is no dataclass. Put @dataclasses.dataclass(frozen=True, kw_only=True) above it."
            )
        # Not by dataclasses.fields, which torch.compile does not trace.
        fields = cls.__dataclass_fields__.values()
        names = [field.name for field in fields if field.init and "ClassVar" not in str(field.type)]
        known = ", ".join(names) or "none"
        if args:
            raise TypeError(f"{cls.__name__} takes keyword arguments only, got {args!r}. Its options: {known}.")
        for option in options:
            if option not in names:
                near = difflib.get_close_matches(option, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__} has no option {option!r}.{hint} Its options: {known}.")
        return super().__new__(cls)


def require_positive_int(owner: object, name: str, value: object, *, optional: bool = False) -> None:
    """Raise a ValueError naming ``owner`` and the option unless ``value`` is an int >= 1 (or None when optional)."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        allowed = "a positive integer or None" if optional else "a positive integer"
        raise ValueError(f"{type(owner).__name__}({name}=...) must be {allowed}, got {value!r}.")


def require_damping(owner: object, value: float) -> None:
    """Raise a ValueError unless ``0 < value <= 1``."""
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{type(owner).__name__}(damping=...) must be in (0, 1], got {value!r}. 1 is the undamped step."
        )
