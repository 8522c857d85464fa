"""Backward modes by name, and the classes themselves."""

from typing import Any

from implicit.backward._base import Backward, SolveOptions
from implicit.backward.implicit import Implicit
from implicit.backward.unrolled import Unrolled
from solvers._names import resolve

__all__ = ["Backward", "Implicit", "SolveOptions", "Unrolled", "get_backward"]

_BACKWARDS: dict[str, type[Backward]] = {"unrolled": Unrolled, "implicit": Implicit}


def get_backward(backward: Backward | str, **options: Any) -> Backward:
    """The backward mode of that name with these options; an object passes through.

    Args:
        backward: ``"unrolled"`` or ``"implicit"``, or a backward mode.
        **options: The hyperparameters of the named mode.

    Raises:
        ValueError: No backward mode has that name; the message lists those that exist.
        TypeError: The mode has no such option, or options came with an object, or it is no backward mode.

    Example:
        >>> from implicit import get_backward
        >>> get_backward("unrolled")
        Unrolled()
    """
    return resolve(backward, options, Backward, _BACKWARDS, "backward mode")
