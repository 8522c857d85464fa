"""Copies of objects with other tensors in their place."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

T = TypeVar("T")


def with_tensors(thing: T, change: Callable[[Any], Any], kinds: type | tuple[type, ...] = Tensor) -> T:
    """A copy of ``thing`` in which ``change`` has been applied to every tensor.

    Args:
        thing: A pytree of tensors, dataclasses of such pytrees, and any other leaves, which are kept.
        change: The function. It is called in an order that depends only on the structure of ``thing``.
        kinds: The types to apply it to instead of tensors.
    """

    def leaf(x: Any) -> Any:
        if isinstance(x, kinds):
            return change(x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            names = [field.name for field in dataclasses.fields(x)]
            return dataclasses.replace(x, **{name: with_tensors(getattr(x, name), change, kinds) for name in names})
        return x

    replaced: T = tree_map(leaf, thing)
    return replaced


def copy_with_tensors(thing: T, change: Callable[[Tensor], Tensor]) -> T:
    """A copy of any object in which ``change`` has been applied to every tensor in its attributes."""
    other = copy.copy(thing)
    vars(other).update(with_tensors(vars(thing), change))
    return other
