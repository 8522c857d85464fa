"""Copies of objects with other tensors in them."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

T = TypeVar("T")


def with_tensors(thing: T, change: Callable[[Any], Any], kinds: type | tuple[type, ...] = Tensor) -> T:
    """``thing``, a pytree of tensors, dataclasses and whatever else, with ``change`` of every tensor in its place.

    The tensors, or what is of ``kinds``, are visited in an order that depends on the structure alone.
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
    """A copy of any object, with ``change`` of every tensor in its attributes."""
    other = copy.copy(thing)
    vars(other).update(with_tensors(vars(thing), change))
    return other
