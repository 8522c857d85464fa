"""Backward modes by name, and the classes themselves."""

from collections.abc import Callable
from typing import Any

from implicit.backward.auto import AutoBackward
from implicit.backward.backward import Backward, SolveOptions
from implicit.backward.checkpointed import Checkpointed
from implicit.backward.implicit import Implicit
from implicit.backward.jfb import JFB
from implicit.backward.phantom import Phantom
from implicit.backward.shine import SHINE
from implicit.backward.unrolled import Unrolled
from solvers.linear import NeumannSeries
from solvers.problem.names import resolve

__all__ = [
    "AutoBackward",
    "Backward",
    "Checkpointed",
    "Implicit",
    "JFB",
    "Phantom",
    "SHINE",
    "SolveOptions",
    "Unrolled",
    "get_backward",
]


def _neumann(**options: Any) -> Implicit:
    return Implicit(linear_solver=NeumannSeries(**options))


_BACKWARDS: dict[str, Callable[..., Backward]] = {
    "unrolled": Unrolled,
    "checkpointed": Checkpointed,
    "implicit": Implicit,
    "phantom": Phantom,
    "jfb": JFB,
    "neumann": _neumann,
    "shine": SHINE,
    "auto": AutoBackward,
}

# Found rather than made where a name is resolved inside torch.compile, which traces no dataclass in a dataclass.
_DEFAULTS = {name: mode() for name, mode in _BACKWARDS.items()}


def get_backward(backward: Backward | str, **options: Any) -> Backward:
    """The backward mode of that name with these options; an object passes through.

    Args:
        backward: ``"unrolled"``, ``"checkpointed"``, ``"implicit"``, ``"phantom"``, ``"jfb"``, ``"neumann"`` (implicit,
            with the truncated series of ``terms`` terms), ``"shine"`` or ``"auto"``; or a backward mode.
        **options: The hyperparameters of the named mode.

    Raises:
        ValueError: No backward mode has that name; the message lists those that exist.
        TypeError: The mode has no such option, or options came with an object, or it is no backward mode.

    Example:
        >>> from implicit import get_backward
        >>> get_backward("phantom", steps=3)
        Phantom(steps=3, damping=1.0)
        >>> get_backward("neumann", terms=3)
        Implicit(linear_solver=NeumannSeries(terms=3))
    """
    if isinstance(backward, str) and backward in _DEFAULTS and not options:
        return _DEFAULTS[backward]
    return resolve(backward, options, Backward, _BACKWARDS, "backward mode")
