"""The modules and tensors that a callable refers to, as far as its code shows; others it may still reach as it runs."""

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Attributes of a tensor that do not depend on its values.
_ATTRIBUTES_OF_SHAPE = {"device", "dim", "dtype", "ndim", "shape", "size"}


def modules_used_by(f: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable runs: itself, the one it is bound to, or those that a function refers to."""
    return [thing for thing in references_of(f) if isinstance(thing, nn.Module)]


def references_of(f: Callable[..., Any]) -> list[nn.Module | Tensor]:
    """The modules and tensors that a callable is, is bound to or refers to, each once.

    References are variables of closures and of the file, their attributes, defaults, arguments of partials, and the
    entries of lists, tuples and dicts. They are followed into other functions, except imported ones.
    Of a module it is the submodule that counts if the code names it, as in ``net.cell(z)``.
    """
    found: list[nn.Module | Tensor] = []
    queue: list[Any] = [f]
    seen: set[int] = set()
    for thing in queue:  # which grows
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (nn.Module, Tensor)):
            found.append(thing)
        elif isinstance(thing, (list, tuple)):
            queue.extend(thing)
        elif isinstance(thing, dict):
            queue.extend(thing.values())
        elif isinstance(thing, functools.partial):
            queue.extend((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, types.FunctionType):
            queue.extend((*_variables(thing), thing.__defaults__, thing.__kwdefaults__))
        elif isinstance(thing, types.MethodType):
            function, owner = thing.__func__, thing.__self__
            if isinstance(owner, nn.Module):
                queue.append(owner)
            if isinstance(function, types.FunctionType):
                queue.extend(_variables(function, None if isinstance(owner, nn.Module) else owner))
        elif callable(thing) and isinstance(type(thing).__call__, types.FunctionType):
            queue.append(types.MethodType(type(thing).__call__, thing))
    return found


def _variables(function: types.FunctionType, bound: object = None) -> Iterator[Any]:
    """The values that a function reads from outside; ``bound`` is its first argument, if that is known."""
    code = function.__code__
    near: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            near[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if bound is not None:
        near[_FIRST] = near[code.co_varnames[0]] = bound
    # The globals of PyTorch's wrappers lead to all of PyTorch.
    own_file = not str(function.__globals__.get("__name__")).startswith("torch.")
    for name, *attributes in _paths(code):
        if name in near:
            yield _attribute(near[name], attributes)
        elif own_file and name in function.__globals__:
            value = _attribute(function.__globals__[name], attributes)
            if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
                yield value


def _attribute(value: Any, names: list[str]) -> Any:
    """The attribute of an attribute and so on of a value, as far as it is stored and not computed."""
    for name in names:
        if isinstance(value, Tensor):
            return None if name in _ATTRIBUTES_OF_SHAPE else value
        stores = [getattr(value, "__dict__", {})]
        if isinstance(value, nn.Module):
            stores += [value._modules, value._parameters, value._buffers]
        store = next((store for store in stores if name in store), None)
        if store is not None:
            value = store[name]
        elif isinstance(value, nn.Module):
            return value  # a method or property of it may use all of it
        elif isinstance(function := getattr(type(value), name, None), types.FunctionType):
            return types.MethodType(function, value)
        else:
            return value
    return value


# The name of the first argument in paths.
_FIRST = ""


@functools.lru_cache(maxsize=4096)
def _paths(code: types.CodeType, *, outermost: bool = True) -> tuple[tuple[str, ...], ...]:
    """The variables that code reads from outside, and its first argument, each with the attributes read from it."""
    paths: list[list[str]] = []
    path: list[str] | None = None
    first = code.co_varnames[0] if outermost and code.co_argcount else None
    for instruction in dis.get_instructions(code):
        kind, names = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            if path is not None:
                path.append(names)
            continue
        path = None
        if kind in ("LOAD_GLOBAL", "LOAD_DEREF"):
            path = [names]
            paths.append(path)
        elif "LOAD_FAST" in kind:
            # Newer versions of Python load two variables, or store one and load one, by one instruction.
            loaded = names if isinstance(names, tuple) else (names,)
            for name in loaded[kind.startswith("STORE") :]:
                path = [_FIRST] if name == first else None
                if path is not None:
                    paths.append(path)
    inner = [_paths(constant, outermost=False) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys([*map(tuple, paths), *(path for paths_of in inner for path in paths_of)]))


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
