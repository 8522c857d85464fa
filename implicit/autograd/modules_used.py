"""The modules and tensors that a callable refers to, as far as its code shows; others it may still reach as it runs."""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# What may hold tensors, apart from callables.
_HOLDERS = (Tensor, nn.Module, list, tuple, dict)
# Attributes of a tensor that do not depend on its values.
_ATTRIBUTES_OF_SHAPE = {"device", "dim", "dtype", "ndim", "shape", "size"}


def modules_used_by(f: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable runs: itself, the one it is bound to, or those that a function refers to."""
    return [thing for thing in references_of(f) if isinstance(thing, nn.Module)]


def references_of(f: Callable[..., Any]) -> list[nn.Module | Tensor]:
    """The modules and tensors that a callable is, is bound to or refers to, each once.

    References are variables of closures and of the file, their attributes, defaults, arguments of partials, the entries
    of lists, tuples and dicts, and what the ``forward`` of modules refers to beside their own parameters. They are
    followed into other functions, except imported ones.
    Of a module it is the submodule that counts if the code names it, as in ``net.cell(z)``.
    """
    found: list[nn.Module | Tensor] = []
    queue: list[Any] = [f]
    seen: set[int] = set()
    for thing in queue:  # which grows
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, nn.Module):
            found.append(thing)
            for module in thing.modules():
                seen.add(id(module))
                queue.extend(_beside_parameters(module))
        elif isinstance(thing, (list, tuple)):
            queue.extend(thing)
        elif isinstance(thing, dict):
            queue.extend(thing.values())
        elif isinstance(thing, functools.partial):
            queue.extend((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, staticmethod):
            queue.append(thing.__func__)
        elif isinstance(thing, types.FunctionType):
            queue.extend(_variables(thing))
        elif isinstance(thing, types.MethodType):
            if isinstance(thing.__self__, nn.Module):
                queue.append(thing.__self__)
            queue.extend(_variables(thing, thing.__self__))
        elif callable(thing) and isinstance(type(thing).__call__, types.FunctionType):
            queue.append(types.MethodType(type(thing).__call__, thing))
    return found


def _beside_parameters(module: nn.Module) -> Iterator[Any]:
    """The values that the ``forward`` of a module reads, apart from its submodules, parameters and buffers."""
    own = vars(module)
    if "forward" in own:  # in place of that of its class
        yield own["forward"]
    kind: Any = type(module)
    attributes, functions = _read_by_forward(kind)
    for (name, *path), of_class in attributes.items():
        value = own.get(name, of_class)
        if value is not None:
            yield _attribute(value, path)
    for function in functions:
        yield from _variables(function)


@functools.lru_cache(maxsize=4096)
def _read_by_forward(kind: type[nn.Module]) -> tuple[dict[tuple[str, ...], Any], list[types.FunctionType]]:
    """What ``forward``, and the methods and functions of its file that it calls, read in modules of this class.

    Returns:
        The paths of attributes, each with the value that the class has for the first; those of the functions that refer
        to something else.
    """
    attributes: dict[tuple[str, ...], Any] = {}
    functions: dict[types.FunctionType, None] = {}
    queue: list[tuple[Any, bool]] = [(_of_class(kind, "forward"), True)]
    for function, is_method in queue:  # which grows
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, types.FunctionType) or function in functions or _is_torchs(function):
            continue
        functions[function] = None
        code = function.__code__
        for name, *path in _paths(code):
            value = function.__globals__.get(name)
            if name == "super":
                queue.extend((method, True) for method in _inherited(kind.__mro__, code))
            elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                queue.append((value, False))
            elif is_method and path and name in (_FIRST, *code.co_varnames[:1]):
                value = _of_class(kind, path[0])
                if isinstance(value, types.FunctionType):
                    queue.append((value, True))
                elif isinstance(value, (staticmethod, classmethod)):
                    queue.append((value.__func__, isinstance(value, classmethod)))
                else:
                    attributes[tuple(path)] = value if isinstance(value, _HOLDERS) else None
    return attributes, [function for function in functions if _refers(function)]


def _refers(function: types.FunctionType) -> bool:
    """Whether a function refers to something beside its arguments that may hold tensors."""
    if {*function.__code__.co_freevars} - {"__class__"}:
        return True
    values = [function.__globals__.get(name) for name, *_ in _paths(function.__code__)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    without = (type, types.FunctionType, types.BuiltinFunctionType)
    return any(isinstance(value, _HOLDERS) or (callable(value) and not isinstance(value, without)) for value in values)


def _of_class(kind: type, name: str) -> Any:
    """What the class has by this name; of a property, the function that computes it."""
    value = inspect.getattr_static(kind, name, None)
    return value.fget if isinstance(value, property) else value


def _is_torchs(function: types.FunctionType) -> bool:
    """Whether it is PyTorch's own, whose globals lead to all of PyTorch."""
    return str(function.__globals__.get("__name__")).startswith("torch.")


def _variables(function: Callable[..., Any], owner: object = None) -> Iterator[Any]:
    """The values that a function reads from outside; ``owner`` is what its first argument is, if that is known."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return
    if hasattr(function, "__wrapped__"):  # by a decorator
        yield from _variables(function.__wrapped__, owner)
    code, own_file = function.__code__, not _is_torchs(function)
    near: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            near[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if owner is not None and own_file:
        near |= dict.fromkeys((_FIRST, *code.co_varnames[:1]), owner)
    yield from (function.__defaults__, function.__kwdefaults__)
    for name, *attributes in _paths(code):
        if name in near:
            yield _attribute(near[name], attributes)
        elif own_file and name in function.__globals__:
            value = _attribute(function.__globals__[name], attributes)
            if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
                yield value
        elif name == "super" and "__class__" in near and isinstance(owner, near["__class__"]):
            bases = type(owner).__mro__
            methods = _inherited(bases[bases.index(near["__class__"]) + 1 :], code)
            yield from (types.MethodType(method, owner) for method in methods)


def _inherited(bases: Sequence[type], code: types.CodeType) -> list[types.FunctionType]:
    """The methods of these classes whose names code reads."""
    named = (vars(base).get(name) for base in bases for name in code.co_names)
    return [method for method in named if isinstance(method, types.FunctionType)]


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
            owner, value = value, store[name]
            if isinstance(value, classmethod):
                value = types.MethodType(value.__func__, owner)
            continue
        of_class = _of_class(type(value), name)
        if isinstance(of_class, types.FunctionType):
            return types.MethodType(of_class, value)
        if isinstance(of_class, classmethod):
            return types.MethodType(of_class.__func__, type(value))
        if isinstance(of_class, staticmethod):
            return of_class
        if isinstance(of_class, types.MemberDescriptorType):  # of a class with slots
            value = getattr(value, name, None)
            continue
        if not isinstance(of_class, _HOLDERS):
            return value
        value = of_class
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
