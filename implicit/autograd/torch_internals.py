"""Every name that PyTorch keeps private and this package uses, and the two functions of PyTorch that it wraps.

A new version of PyTorch may change any of these without notice. ``tests/test_torch_internals.py`` checks that each one
exists and behaves as described here, so that a change is found there first.

==================================================================  ==============
name                                                                tried on torch
==================================================================  ==============
``torch._C._functorch.peek_interpreter_stack``, ``CInterpreter``    2.11 to 2.14
``torch._C._functorch.get_unwrapped`` and its neighbors             2.11 to 2.14
``torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack``  2.14
``torch.autograd.forward_ad._current_level``                        2.11 to 2.14
``torch.autograd.forward_ad._set_fwd_grad_enabled``                 2.11 to 2.14
``torch._C._current_graph_task_id``                                 2.11 to 2.14
``torch._C._autograd._get_current_graph_task_keep_graph``           2.14
``torch._C._vmapmode_increment_nesting`` and its neighbors          2.11 to 2.14
``torch.Tensor._backward_hooks``                                    2.11 to 2.14
``torch.nn.utils.parametrize._cache``                               2.11 to 2.14
``torch.nn.utils.parametrize.ParametrizationList.forward``          2.14
``torch.nn.utils.stateless._functional_call``                       2.14
``torch.nn.utils.stateless._reparametrize_module``                  2.14
==================================================================  ==============
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, stateless
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakIdKeyDictionary

from solvers.problem.forward_mode import FORWARD_MODE

# Transforms: torch.func and forward-mode AD.


def transform_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is tracing: tensors may be wrapped, modules swapped."""
    # Not "is not None", which torch.compile takes to be true of the None that it finds there.
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if isinstance(interpreter, torch._C._functorch.CInterpreter):
        return True
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    return bool(FORWARD_MODE.unless_elsewhere(lambda: forward_ad._current_level >= 0))


def transform_level() -> int:
    """How many transforms of torch.func are tracing, one inside the other."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return int(interpreter.level()) if isinstance(interpreter, torch._C._functorch.CInterpreter) else 0


@contextlib.contextmanager
def outside_transforms_above(level: int) -> Iterator[None]:
    """Inside, only the outermost ``level`` transforms of torch.func are tracing."""
    with contextlib.ExitStack() as stack:
        for _ in range(transform_level() - level):
            stack.enter_context(pyfunctorch.temporarily_pop_interpreter_stack())
        yield


def is_followed(tensor: Tensor) -> bool:
    """Whether reverse or forward mode, at any level, follows the tensor."""
    return any(layer.requires_grad or _has_tangent(layer) for layer in _layers(tensor))


def vmap_levels(tensor: Tensor) -> set[int]:
    """The levels of ``torch.func.vmap`` that have a hidden dimension in the tensor."""
    functorch = torch._C._functorch
    return {functorch.maybe_get_level(layer) for layer in _layers(tensor) if functorch.is_batchedtensor(layer)}


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor and what the transforms have wrapped in it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _has_tangent(tensor: Tensor) -> bool:
    if torch._C._functorch.is_batchedtensor(tensor):  # its inner layers have the tangent, if there is one
        return False
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None


def without_tangent(tensor: Tensor) -> Tensor:
    """The tensor as the outermost forward-mode level sees it without its tangent."""
    primal: Tensor = forward_ad.unpack_dual(tensor, level=0).primal
    return primal


def forward_mode_enabled() -> contextlib.AbstractContextManager[None]:
    """A context in which forward mode is on. PyTorch turns it off inside the ``jvp`` of a Function."""
    return forward_ad._set_fwd_grad_enabled(True)


# The backward pass.


def in_backward_pass() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    # While PyTorch traces it is in none.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def backward_pass_keeps_graph() -> bool:
    """Whether the running backward pass was asked to keep the graph, by ``retain_graph`` or ``create_graph``."""
    return torch.compiler.is_compiling() or bool(torch._C._autograd._get_current_graph_task_keep_graph())


@contextlib.contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context in which gradients to these tensors run none of their hooks and are not retained.

    A gradient that is computed inside a backward pass, and returned to it, would run them twice.
    """
    hooks = [(tensor._backward_hooks, dict(tensor._backward_hooks)) for tensor in tensors if tensor._backward_hooks]
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    for held, _ in hooks:
        held.clear()
    try:
        yield
    finally:
        for held, before in hooks:
            held.update({**before, **held})
        for tensor, gradient in retained:
            tensor.grad = gradient


Derivative = Callable[..., tuple[Tensor | None, ...]]


def one_vector_at_a_time(derivative: Derivative) -> Derivative:
    """Lets ``derivative(ctx, *tensors)`` of a Function serve ``torch.autograd.grad(..., is_grads_batched=True)``.

    That passes tensors with a hidden dimension, of the ``vmap`` that was before torch.func, for which a Function cannot
    have a rule. So do ``torch.autograd.functional.jacobian(vectorize=True)`` and gradcheck's ``check_batched_grad``.
    The derivative is called once for each index of that dimension.
    """

    @functools.wraps(derivative)
    def wrapped(ctx: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
        if not any(_has_hidden_dimension(x) for x in tensors):
            return derivative(ctx, *tensors)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # A tensor without the dimension gets it, in the size that is given.
        size = max(len(torch._remove_batch_dim(x, level, 1, 0)) for x in tensors if isinstance(x, Tensor))
        every = [torch._remove_batch_dim(x, level, size, 0) if isinstance(x, Tensor) else x for x in tensors]
        results = [derivative(ctx, *(x[i] if isinstance(x, Tensor) else x for x in every)) for i in range(size)]
        return tuple(
            None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
            for column in zip(*results, strict=True)
        )

    return wrapped


def _has_hidden_dimension(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._dispatch_keys(x).has("Batched")


# Parametrized weights.


class WeightSource(Protocol):
    """Says what a parametrized weight is, instead of the parametrization itself."""

    def weight_of(self, parametrization: ParametrizationList) -> Tensor:
        """The weight. It may call :func:`computed_weight`."""


# What parametrized weights are read from in this thread (or task of asyncio); None: from their parametrizations.
weight_source: ContextVar[WeightSource | None] = ContextVar("weight_source", default=None)

computed_weight: Callable[[ParametrizationList], Tensor] = ParametrizationList.forward


# What parametrized weights are in what torch.compile traces. It is only ever other than empty while it traces, when no
# value is assigned outside of the trace.
_traced_weights: tuple[tuple[ParametrizationList, Tensor], ...] = ()


@contextlib.contextmanager
def tracing_weights(weights: Sequence[tuple[ParametrizationList, Tensor]]) -> Iterator[None]:
    """While torch.compile traces, which knows no context variables: inside, parametrized weights are these."""
    global _traced_weights
    _traced_weights = tuple(weights)
    try:
        yield
    finally:
        _traced_weights = ()


@functools.wraps(computed_weight)
def _weight(self: ParametrizationList) -> Tensor:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]  # as PyTorch's own; the rest cannot be scripted
        raise RuntimeError("Parametrization is not working with scripting.")
    if torch.compiler.is_compiling():
        for parametrization, weight in _traced_weights:
            if parametrization is self:
                return weight
        return computed_weight(self)
    source = weight_source.get()
    weight = computed_weight(self) if source is None else source.weight_of(self)
    if parametrize._cache_enabled:
        _cached_by[weight] = self
    return weight


# A read of a parametrized weight calls this. Without a source it does what it did before.
ParametrizationList.forward = _weight  # type: ignore[method-assign]


def originals_of(parametrization: ParametrizationList) -> tuple[Tensor | None, ...]:
    """The tensors that the weight is computed from, as they are now."""
    return (*parametrization._parameters.values(), *parametrization._buffers.values())


# What the weights that parametrize.cached() holds belong to.
_cached_by = WeakIdKeyDictionary()


def cached_weights() -> dict[ParametrizationList, Tensor]:
    """The weights that ``torch.nn.utils.parametrize.cached()`` holds now, which are read without a computation."""
    if not parametrize._cache:
        return {}
    weights = [weight for weight in parametrize._cache.values() if weight is not None and weight in _cached_by]
    return {_cached_by[weight]: weight for weight in weights}


def put_in_cache(weights: Mapping[ParametrizationList, Tensor]) -> None:
    """Let ``torch.nn.utils.parametrize.cached()`` hold these weights, where it holds others now."""
    for key, weight in list(parametrize._cache.items()):
        given = weights.get(_cached_by[weight]) if weight is not None and weight in _cached_by else None
        if given is not None and given is not weight:
            _cached_by[given] = _cached_by[weight]
            parametrize._cache[key] = given


@contextlib.contextmanager
def in_cache(weights: Mapping[ParametrizationList, Tensor]) -> Iterator[None]:
    """Inside, what ``torch.nn.utils.parametrize.cached()`` holds, if the user has called it, reads as these weights."""
    before = cached_weights()
    put_in_cache(weights)
    try:
        yield
    finally:
        if before:
            put_in_cache(before)


# What parametrize.cached() holds, by the id of a module and the name of a weight.
Cache = dict[tuple[int, str], Tensor | None]


def copy_of_cache() -> Cache:
    """The weights that ``torch.nn.utils.parametrize.cached()`` holds now."""
    return dict(parametrize._cache)


@contextlib.contextmanager
def reading_from_cache(weights: Cache) -> Iterator[None]:
    """Inside, these weights are read from PyTorch's cache, in all threads."""
    with parametrize.cached():
        parametrize._cache.update(weights)
        yield


# Tensors lent by torch.func.functional_call.


@dataclasses.dataclass
class Loan:
    """The tensors that a running ``torch.func.functional_call`` lends to a module.

    Attributes:
        module: The module that has them instead of its own for the time of the call.
        tensors: The tensors, by the names of its parameters and buffers.
    """

    module: nn.Module
    tensors: dict[str, Tensor]


# The arguments of the calls that are running in this thread, the outermost first.
_calls: ContextVar[tuple[tuple[nn.Module, Mapping[str, Tensor]], ...]] = ContextVar("functional_calls", default=())

_functional_call = stateless._functional_call


@functools.wraps(_functional_call)
def _noted_functional_call(
    module: nn.Module, parameters_and_buffers: dict[str, Tensor], *args: Any, **options: Any
) -> Any:
    if torch.compiler.is_compiling():
        return _functional_call(module, parameters_and_buffers, *args, **options)
    token = _calls.set((*_calls.get(), (module, parameters_and_buffers)))
    try:
        return _functional_call(module, parameters_and_buffers, *args, **options)
    finally:
        _calls.reset(token)


# torch.func.functional_call calls this. It does what it did before.
stateless._functional_call = _noted_functional_call


def current_loans() -> list[Loan]:
    """What ``torch.func.functional_call`` lends at the moment to modules, in this thread."""
    loans = []
    for module, given in _calls.get():
        lent = set(map(id, given.values()))
        # As the module has them now: under all names of a tensor that has several.
        parameters = module.named_parameters(remove_duplicate=False)
        buffers = module.named_buffers(remove_duplicate=False)
        loans.append(Loan(module, {name: tensor for name, tensor in (*parameters, *buffers) if id(tensor) in lent}))
    return loans


@contextlib.contextmanager
def lending(loans: Sequence[Loan]) -> Iterator[None]:
    """Inside, the modules have these tensors again: for a call of the map in the backward pass."""
    with contextlib.ExitStack() as stack:
        for loan in loans:
            stack.enter_context(stateless._reparametrize_module(loan.module, dict(loan.tensors)))
        yield
