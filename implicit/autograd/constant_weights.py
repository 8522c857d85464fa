"""Parametrized weights computed once for a whole solve, and put in the map as explicit tensors.

A parametrization (spectral normalization, weight normalization, orthogonality ...) computes its weight at every
access: in every call of the map, and with power iteration each time to another value. A solve needs one constant map,
so the weights are computed before it and put in the cache of ``torch.nn.utils.parametrize`` while the map runs.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

# A parametrized tensor: the module that owns it and its name.
Slot = tuple[nn.Module, str]


def modules_used_by(f: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable runs: itself, the one it is bound to, or those that a function refers to."""
    if isinstance(f, nn.Module):
        return [f]
    if isinstance(f, functools.partial):
        found = modules_used_by(f.func)
        return found + [value for value in (*f.args, *f.keywords.values()) if isinstance(value, nn.Module)]
    if isinstance(f, types.MethodType):
        bound = [f.__self__] if isinstance(f.__self__, nn.Module) else []
        return bound + modules_used_by(f.__func__)
    if isinstance(f, types.FunctionType):
        variables = inspect.getclosurevars(f)
        values = [*variables.nonlocals.values(), *variables.globals.values()]
        return [value for value in values if isinstance(value, nn.Module)]
    return []


def parametrized_slots(modules: Sequence[nn.Module]) -> list[Slot]:
    """Every parametrized tensor in these modules and their children, each once."""
    slots = {
        (id(module), name): (module, name)
        for root in modules
        for module in root.modules()
        if parametrize.is_parametrized(module)
        for name in cast(nn.ModuleDict, module.parametrizations)
    }
    return list(slots.values())


def constant_weights(f: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, the parametrized weights of the modules that f uses are what they are now, and not computed again."""
    slots = parametrized_slots(modules_used_by(f))
    return substituted(slots, [getattr(module, name) for module, name in slots])


@contextlib.contextmanager
def substituted(slots: Sequence[Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each parametrized tensor reads as the value given, with no computation."""
    if not slots:
        yield
        return
    with parametrize.cached():
        cache = parametrize._cache
        keys = [(id(module), name) for module, name in slots]
        before = [cache.get(key) for key in keys]
        cache.update(zip(keys, values, strict=True))
        try:
            yield
        finally:
            for key, value in zip(keys, before, strict=True):
                if value is None:
                    cache.pop(key, None)
                else:
                    cache[key] = value
