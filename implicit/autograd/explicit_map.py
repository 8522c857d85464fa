"""The user's map with every tensor that it depends on made explicit."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from implicit.autograd.constant_weights import ConstantWeights, Weights
from implicit.autograd.modules_used import references_of
from implicit.autograd.torch_internals import Loan, cached_weights, current_loans, is_followed, lending, vmap_levels
from implicit.autograd.traced_map import with_weights
from solvers.problem import Traceable
from solvers.problem.autocast import AutocastMode
from solvers.problem.layout import check_structure

# A result of a node of autograd's graph: the node, and which of its results.
Edge = tuple[Any, int]

# The placeholder of a tensor among arguments.
_TENSOR = object()


class ExplicitMap:
    """``f(z, *args)`` as a function of the leaves of z and a flat list of tensors. It holds no tensor itself.

    The list, which :func:`make_explicit` returns beside the map, holds the tensors of ``args``, the parametrized
    weights that f reads, the tensors that ``torch.func.functional_call`` lends to modules at the time, and, while a
    transform is tracing and f is a module, its parameters and buffers.

    Args:
        f: The user's map.
        state_spec: The structure of the state.
        state_dtypes: The dtypes of the state.
        arguments: The leaves of ``args``, with a placeholder for each tensor, and their structure.
        parametrizations: Those of the weights.
        loans: The modules to which tensors are lent, and the names of these.
        names: The parameters and buffers of f.
        autocast: The mode in which f runs.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        state_spec: TreeSpec,
        state_dtypes: set[torch.dtype],
        arguments: tuple[list[Any], TreeSpec],
        parametrizations: list[ParametrizationList],
        loans: list[tuple[nn.Module, list[str]]],
        names: list[str],
        autocast: AutocastMode,
    ) -> None:
        self._f = f
        self._state_spec = state_spec
        self._state_dtypes = state_dtypes
        self._arguments, self._argument_spec = arguments
        self._parametrizations = parametrizations
        self._loans = loans
        self._names = names
        self._autocast = autocast

    def __call__(self, z: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of ``f(z, *args)`` for the leaves of z; under autocast in the dtypes of z."""
        supply = iter(tensors)
        arguments = [next(supply) if leaf is _TENSOR else leaf for leaf in self._arguments]
        inputs = (tree_unflatten(list(z), self._state_spec), *tree_unflatten(arguments, self._argument_spec))
        with self._substituted(supply), self._autocast.in_force():
            if self._names:
                named = {name: next(supply) for name in self._names}
                output = functional_call(self._f, named, inputs)  # type: ignore[arg-type]
            else:
                output = self._f(*inputs)
        leaves, spec = tree_flatten(output)
        check_structure(spec, self._state_spec, "f")
        if self._autocast.enabled:
            leaves = [leaf.to(like.dtype) for leaf, like in zip(leaves, z, strict=True)]
        return leaves

    def traced(
        self, z: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[Callable[..., Any], Any, tuple[Any, ...], AutocastMode] | None:
        """f as a compiled solve takes it, the state, further arguments, the mode; None where modules borrow tensors."""
        if self._loans or self._names:
            return None
        supply = (tensor.detach() for tensor in tensors)
        arguments = [next(supply) if leaf is _TENSOR else leaf for leaf in self._arguments]
        f = with_weights(self._f, {parametrization: next(supply) for parametrization in self._parametrizations})
        state = tree_unflatten([leaf.detach() for leaf in z], self._state_spec)
        return f, state, tuple(tree_unflatten(arguments, self._argument_spec)), self._autocast

    def _substituted(self, supply: Iterator[Tensor]) -> contextlib.AbstractContextManager[object]:
        """A context in which the weights and what is lent are the next tensors of ``supply``."""
        if not (self._parametrizations or self._loans):  # as always while torch.compile traces
            return contextlib.nullcontext()
        context = contextlib.ExitStack()
        if self._parametrizations:
            weights = {parametrization: next(supply) for parametrization in self._parametrizations}
            context.enter_context(ConstantWeights(weights).in_force())
        if self._loans:
            loans = [Loan(module, {name: next(supply) for name in names}) for module, names in self._loans]
            context.enter_context(lending(loans))
        return context

    @property
    def resolution(self) -> float:
        """Relative rounding of the map where it is coarser than the algebra's: half precision, stored or autocast."""
        dtypes = self._autocast.dtypes_of(self._state_dtypes)
        return max([0.0, *[torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize == 2]])


def make_explicit(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    weights: Weights | None = None,
    loans: Sequence[Loan] = (),
    named: dict[str, Tensor] | None = None,
) -> tuple[ExplicitMap, list[Tensor]]:
    """The map and the list of its tensors.

    Args:
        f: The user's map.
        z0: The start; only its structure and dtypes are used.
        args: Further arguments of ``f``: any pytrees.
        weights: The parametrized weights that f reads.
        loans: The tensors that are lent to modules while f runs.
        named: Parameters and buffers of f, which is a module then.
    """
    weights, named = weights or {}, named or {}
    leaves, state_spec = tree_flatten(z0)
    arguments, argument_spec = tree_flatten(args)
    tensors = [leaf for leaf in arguments if isinstance(leaf, Tensor)]
    tensors += weights.values()
    for loan in loans:
        tensors += loan.tensors.values()
    tensors += named.values()
    explicit = ExplicitMap(
        f,
        state_spec,
        {leaf.dtype for leaf in leaves},
        ([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in arguments], argument_spec),
        list(weights),
        [(loan.module, list(loan.tensors)) for loan in loans],
        list(named),
        AutocastMode.current(leaves[0].device.type),
    )
    return explicit, tensors


def make_explicit_under_transform(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...]
) -> tuple[ExplicitMap, list[Tensor]]:
    """The same while a transform is tracing, when every tensor that it follows must be explicit.

    Costs one call of f, in which its parametrized weights are computed, at the level of the transform.

    Raises:
        RuntimeError: f uses a tensor that a transform, or autograd outside it, follows but that is not explicit, so
            that the derivative would be lost.
    """
    weights = ConstantWeights(cached_weights())
    loans, named = [], {}
    if isinstance(f, nn.Module):
        every = {**dict(f.named_parameters()), **dict(f.named_buffers())}
        named = {name: tensor for name, tensor in every.items() if not _is_original(name)}
    else:
        loans = [
            Loan(loan.module, {name: tensor for name, tensor in loan.tensors.items() if not _is_original(name)})
            for loan in current_loans()
        ]
    explicit, tensors = make_explicit(f, z0, args, None, loans, named)
    start = [leaf.detach() for leaf in tree_leaves(z0)]
    inputs = [tensor.detach() for tensor in tensors]
    output = weights.calling_as_constants(lambda: explicit(start, inputs))
    mapped = set().union(*(vmap_levels(tensor) for tensor in (*start, *inputs, *weights.values.values())))
    for leaf in output:
        if is_followed(leaf) or not vmap_levels(leaf) <= mapped:
            raise RuntimeError(
                "The map uses a tensor that requires grad, or that a torch.func transform is following, but that "
                "is not among its arguments, so its derivative would be lost. Pass the tensor as an argument, "
                "fixed_point(f, z0, x, weight); or make the map an nn.Module with the tensor as a parameter, "
                "swapped by torch.func.functional_call; or detach the tensor if it is a constant."
            )
    return make_explicit(f, z0, args, weights.values, loans, named) if weights.values else (explicit, tensors)


def _is_original(name: str) -> bool:
    """Whether a parameter belongs to a parametrization: only the weight that is computed from it is explicit."""
    return "parametrizations" in name.split(".")


class FirstCall(Traceable):
    """``f`` for the solver. Its first call is made with gradients, to find the tensors that f brings along by itself.

    Args:
        f: The user's map.
        weights: The parametrized weights of the solve.
        loans: What is lent to modules.
        refers: The callable whose references f may use, if it is not f itself.

    Attributes:
        captured: The tensors that require grad and that f uses beyond its arguments, its parametrized weights and what
            is lent; None before the first call.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        weights: ConstantWeights,
        loans: Sequence[Loan],
        refers: Callable[..., Any] | None = None,
    ) -> None:
        self._f = f
        self._refers = f if refers is None else refers
        self._weights = weights
        self._loans = loans
        self.captured: list[Tensor] | None = None

    def __call__(self, z: Any, *args: Any) -> Any:
        if self.captured is not None:
            return self._f(z, *args)
        arguments = tree_map_only(Tensor, torch.Tensor.detach, args)
        lent = [tensor for loan in self._loans for tensor in loan.tensors.values()]
        known = self._known(set(map(id, lent)))  # before f is called, which may keep its results
        with torch.enable_grad():
            output = self._weights.calling_as_constants(lambda: self._f(z, *arguments))
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.captured = _captured(leaves, lent, known)
        return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)

    def _known(self, lent: set[int]) -> list[Tensor]:
        """The tensors that require grad and that f refers to, except those with the ids ``lent``."""
        tensors: list[Tensor] = []
        for thing in references_of(self._refers):
            tensors.extend(thing.parameters() if isinstance(thing, nn.Module) else [thing])
        return [tensor for tensor in tensors if tensor.requires_grad and id(tensor) not in lent]

    def traced(self) -> Callable[..., Any]:
        return with_weights(self._f, self._weights.values)


def _captured(outputs: Sequence[Tensor], explicit: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that gradients of ``outputs`` would flow to, except the ``explicit`` ones, and the ``known`` ones.

    Known tensors that the outputs do not depend on count because f may use them in other places than z0: in a branch,
    by an expert. The history of known intermediate results that the graph passes through is not differentiated again,
    unless other tensors among those that were found belong to it: then the leaves stand for all.
    """
    roots = [_edge(output) for output in outputs if output.requires_grad and output.grad_fn is not None]
    results = {_edge(tensor): tensor for tensor in known if tensor.grad_fn is not None}
    ends = {_edge(tensor) for tensor in explicit if tensor.grad_fn is not None} - results.keys()
    leaves, passed = _reached(roots, ends | results.keys())
    # An output that is itself a captured leaf has no grad_fn.
    leaves |= {id(tensor): tensor for tensor in (*outputs, *known) if tensor.requires_grad and tensor.is_leaf}
    # By their leaves, because a backward pass may have freed the history of a result that f does not use.
    leaves |= _reached(results.keys() - passed, ends)[0]
    results = {edge: results[edge] for edge in passed & results.keys()}
    before = [edge for node, _ in results for edge in node.next_functions]
    their_leaves, passed_before = _reached(before, set(), results.keys())
    if passed_before or their_leaves.keys() & leaves.keys():
        leaves |= _reached(roots, ends)[0]
        results = {}
    return [*leaves.values(), *results.values()]


def _edge(tensor: Tensor) -> Edge:
    return tensor.grad_fn, tensor.output_nr


def _reached(
    edges: Iterable[Edge], ends: set[Edge], noted: Set[Edge] = frozenset()
) -> tuple[dict[int, Tensor], set[Edge]]:
    """The leaf tensors, by their id, that are reached from ``edges`` without passing one of ``ends``.

    Returns:
        The leaves; those of ``ends`` and ``noted`` that were met.
    """
    met: set[Edge] = set()
    leaves: dict[int, Tensor] = {}
    stack = list(edges)
    seen: set[Any] = set()
    while stack:
        edge = stack.pop()
        if edge in noted or edge in ends:
            met.add(edge)
            if edge in ends:
                continue
        node = edge[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack.extend(node.next_functions)
    return leaves, met
