"""A map that ``torch.compile`` is to see in another form than the solver calls it in."""

import abc
import contextlib
from collections.abc import Callable
from typing import Any


class Traceable(abc.ABC):
    """A map with a form of its own for compiled solves."""

    @abc.abstractmethod
    def __call__(self, z: Any, *args: Any) -> Any:
        """The map."""

    @abc.abstractmethod
    def traced(self) -> Callable[..., Any]:
        """What is compiled, as of the calls made so far: a function of the same arguments, or a :class:`Traced`."""


class Traced(abc.ABC):
    """A map that is compiled inside a context."""

    @abc.abstractmethod
    def __call__(self, z: Any, *args: Any) -> Any:
        """The map."""

    @abc.abstractmethod
    def context(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the loop over the map is traced."""
