"""The modules that a callable refers to, as far as its code shows; others it may still reach when it runs."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize


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


def compute_weights(f: Callable[..., Any]) -> None:
    """Compute the parametrized weights of these modules, for use inside ``constant_weights``.

    A power iteration writes to its buffers when a weight is computed, which is not possible within a torch.func
    transform. Call this before the transform begins.
    """
    if torch.compiler.is_compiling() and not isinstance(f, nn.Module):
        return  # torch.compile cannot look into functions
    for root in modules_used_by(f):
        for module in root.modules():
            if parametrize.is_parametrized(module):
                for name in cast(nn.ModuleDict, module.parametrizations):
                    getattr(module, name)
