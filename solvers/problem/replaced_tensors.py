"""Copies of objects with other tensors in their place."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_is_leaf, tree_map

T = TypeVar("T")

# What is surely a leaf: torch.compile traces all that a pytree is asked.
_ATOMS = (bool, int, float, str, type(None))


def with_tensors(thing: T, change: Callable[[Any], Any], kinds: type | tuple[type, ...] = Tensor) -> T:
    """A copy of ``thing`` in which ``change`` has been applied to every tensor.

    Args:
        thing: A pytree of tensors, dataclasses of such pytrees, and any other leaves, which are kept.
        change: The function. It is called in an order that depends only on the structure of ``thing``.
        kinds: The types to apply it to instead of tensors.
    """
    this: Any = thing
    changed: Any = thing
    if isinstance(this, kinds):
        changed = change(this)
    elif dataclasses.is_dataclass(this) and not isinstance(this, type):
        fields = {field.name: getattr(this, field.name) for field in dataclasses.fields(this)}
        changed = type(this)(**{name: with_tensors(value, change, kinds) for name, value in fields.items()})
    elif not isinstance(this, _ATOMS) and not tree_is_leaf(this):
        changed = tree_map(lambda leaf: with_tensors(leaf, change, kinds), this)
    return changed  # type: ignore[no-any-return]


def copy_with_tensors(thing: T, change: Callable[[Tensor], Tensor]) -> T:
    """A copy of any object in which ``change`` has been applied to every tensor in its attributes."""
    other = copy.copy(thing)
    vars(other).update(with_tensors(vars(thing), change))
    return other
