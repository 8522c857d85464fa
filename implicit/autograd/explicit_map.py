"""The user's map with every tensor that it depends on made explicit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from implicit.autograd.constant_weights import modules_used_by, parametrized_slots, substituted
from implicit.autograd.lent_parameters import in_place, parameters_of
from solvers.problem.autocast import AutocastMode
from solvers.problem.layout import check_structure


def transform_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is tracing: tensors may be wrapped, modules swapped."""
    # Not "is not None", which torch.compile takes to be true of the None that it finds there.
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return isinstance(interpreter, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0


class ExplicitMap:
    """``f(z, *args)`` as a function of z and a flat list of tensors.

    The list holds the tensors of ``args``, the parametrized weights of the modules that f uses (computed here, once),
    and, while a transform is tracing and f is a module, its parameters and buffers. In plain autograd f is called as
    it is, and the tensors that it brings along by itself, such as its parameters, are found by :meth:`first_call`.

    Args:
        f: The user's map.
        z0: The start; only its structure and dtypes are used.
        args: Further arguments of ``f``: any pytrees.
        explicit_weights: Whether the parametrized weights are computed and listed; else they are left to ``f``.
    """

    def __init__(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], *, explicit_weights: bool = True) -> None:
        self._f = f
        self._state_spec = tree_flatten(z0)[1]
        self._arguments, self._argument_spec = tree_flatten(args)
        self._tensor_positions = [i for i, leaf in enumerate(self._arguments) if isinstance(leaf, Tensor)]
        modules = modules_used_by(f) if explicit_weights else []
        self._slots = parametrized_slots(modules)
        self._names: list[str] = []
        tensors = [self._arguments[i] for i in self._tensor_positions]
        tensors += [getattr(module, name) for module, name in self._slots]
        self._lent = [] if transform_active() else parameters_of(modules)
        if transform_active() and isinstance(f, nn.Module):
            named = {**dict(f.named_parameters()), **dict(f.named_buffers())}
            self._names = list(named)
            tensors += list(named.values())
        self.tensors: list[Tensor] = tensors
        leaves = tree_leaves(z0)
        self._state_dtypes = {leaf.dtype for leaf in leaves}
        self._autocast = AutocastMode.current(leaves[0].device.type)

    def __call__(self, z: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of ``f(z, *args)`` for the leaves of z; under autocast in the dtypes of z."""
        arguments = list(self._arguments)
        n, m = len(self._tensor_positions), len(self._slots)
        for position, tensor in zip(self._tensor_positions, tensors[:n], strict=True):
            arguments[position] = tensor
        inputs = (tree_unflatten(list(z), self._state_spec), *tree_unflatten(arguments, self._argument_spec))
        with substituted(self._slots, tensors[n : n + m]), in_place(self._lent), self._autocast.in_force():
            if self._names:
                named = dict(zip(self._names, tensors[n + m :], strict=True))
                output = functional_call(self._f, named, inputs)  # type: ignore[arg-type]
            else:
                output = self._f(*inputs)
        leaves, spec = tree_flatten(output)
        check_structure(spec, self._state_spec, "f")
        if self._autocast.enabled:
            leaves = [leaf.to(like.dtype) for leaf, like in zip(leaves, z, strict=True)]
        return leaves

    @property
    def resolution(self) -> float:
        """Relative rounding of the map where it is coarser than the algebra's: half precision, stored or autocast."""
        dtypes = self._state_dtypes if self._autocast.dtype is None else {*self._state_dtypes, self._autocast.dtype}
        return max([0.0, *[torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize == 2]])

    def first_call(self, z0: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The map at z0, and the leaf tensors requiring grad that f used beyond its arguments."""
        with torch.enable_grad():
            output = self([leaf.detach() for leaf in z0], [tensor.detach() for tensor in self.tensors])
        return [leaf.detach() for leaf in output], _leaves_of_graph(output)

    def refuse_captured(self, z0: Sequence[Tensor]) -> None:
        """Raise if f uses a tensor that a transform, or autograd outside it, follows but that is no argument.

        Costs one call of f. Without it the dependence would be lost and the derivative silently zero.
        """
        inputs = [tensor.detach() for tensor in (*z0, *self.tensors)]
        output = self(inputs[: len(z0)], inputs[len(z0) :])
        mapped = set().union(*(_vmap_levels(tensor) for tensor in inputs))
        for leaf in output:
            if _is_followed(leaf) or not _vmap_levels(leaf) <= mapped:
                raise RuntimeError(
                    "The map uses a tensor that requires grad, or that a torch.func transform is following, but that "
                    "is not among its arguments, so its derivative would be lost. Pass the tensor as an argument, "
                    "fixed_point(f, z0, x, weight); or make the map an nn.Module with the tensor as a parameter, "
                    "swapped by torch.func.functional_call; or detach the tensor if it is a constant."
                )


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor and what the transforms have wrapped in it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _is_followed(tensor: Tensor) -> bool:
    """Whether reverse or forward mode, at any level, is following the tensor."""
    return any(layer.requires_grad or _has_tangent(layer) for layer in _layers(tensor))


def _has_tangent(tensor: Tensor) -> bool:
    if torch._C._functorch.is_batchedtensor(tensor):  # its inner layers have the tangent, if there is one
        return False
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None


def _vmap_levels(tensor: Tensor) -> set[int]:
    return {
        torch._C._functorch.maybe_get_level(layer)
        for layer in _layers(tensor)
        if torch._C._functorch.is_batchedtensor(layer)
    }


def _leaves_of_graph(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors that gradients of ``outputs`` would accumulate into."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    leaves = {}
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    # An output that is itself a captured leaf has no grad_fn.
    leaves |= {id(output): output for output in outputs if output.requires_grad and output.is_leaf}
    return list(leaves.values())
