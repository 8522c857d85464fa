"""What is the same in every turn of a loop, computed once: a pass of ``torch.compile`` over its graph.

A map such as ``z -> tanh(z W + x U)`` computes ``x U`` in every step, and a product with the derivative of a map at a
point what the map has there. ``torch.while_loop`` leaves both in its body. Here they are taken out, which compilers
call loop-invariant code motion. A loop in which that is to be done has :func:`spares`, inputs that it does not use,
and results come into their places.
"""

import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule, Node


class InvariantsFirst(CustomGraphPass):
    """Takes out of the loops of a graph what does not depend on the tensors that they carry."""

    def __call__(self, graph: Graph) -> None:
        loop = torch.ops.higher_order.while_loop
        for node in graph.nodes:
            if loop in (node.target, *node.args[:1]):
                _take_out(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _take_out(graph: Graph, loop: Any) -> None:
    condition, body, given = _parts(graph, loop)
    inputs = list(given)
    # What is returned must be no input, and what is written to changes.
    fixed = _with_bases(source for node in body.nodes if not _is_pure(node) for source in node.all_input_nodes)
    outside = {node: other for node, other in given.items() if other is not None and node not in fixed}
    known = set(outside)
    nodes = []
    for node in body.nodes:
        if _is_pure(node) and node not in fixed and known.issuperset(node.all_input_nodes) and _is_worth_it(node):
            known.add(node)
            nodes.append(node)
    results: list[Node] = []
    inside: set[Node] = set()
    for node in reversed(nodes):
        if any(user not in known or user in inside for user in node.users):
            # What costs nothing is done in both places.
            (inside.add if _is_free(node) else results.append)(node)

    with graph.inserting_before(loop):
        for node in nodes:
            outside[node] = graph.node_copy(node, lambda source: outside[source])
    tested = condition.find_nodes(op="placeholder")[-len(inputs) :] if inputs else []
    places = enumerate(zip(inputs, tested, strict=True))
    free = ((i, pair) for i, pair in places if pair[0] in known and _is_tensor(pair[0]))
    spares = ((i, pair) for i, pair in free if not (pair[0].users or pair[1].users))
    for result, (i, spare) in zip(reversed(results), spares, strict=False):
        if loop.kwargs:
            loop.update_kwarg(f"additional_input{i}", outside[result])
        else:
            others = list(loop.args[-1])
            others[i] = outside[result]
            loop.update_arg(len(loop.args) - 1, tuple(others))
        for node in spare:
            node.meta = dict(result.meta)
        result.replace_all_uses_with(spare[0])
    for node in reversed(nodes):
        for copy in (node, outside[node]):
            if not copy.users:
                copy.graph.erase_node(copy)
    cast(GraphModule, body.owning_module).recompile()


def _parts(graph: Graph, loop: Any) -> tuple[Graph, Graph, dict[Node, Node | None]]:
    """The condition and the body of a loop, and for inputs of the body that are not carried what the loop is given.

    That is None for tensors to which the loop writes. With such PyTorch has one keyword for each of the others.
    """
    if loop.kwargs:
        parts = loop.kwargs["cond_fn"], loop.kwargs["body_fn"]
        num_carried = sum(name.startswith("carried_input") for name in loop.kwargs)
    else:
        *parts, carried, others = loop.args
        num_carried = len(carried)
    condition, body = (getattr(graph.owning_module, part.target).graph for part in parts)
    inputs = body.find_nodes(op="placeholder")[num_carried:]
    if loop.kwargs:
        others = [loop.kwargs.get(f"additional_input{i}") for i in range(len(inputs))]
    return condition, body, dict(zip(inputs, others, strict=True))


def _with_bases(nodes: Iterable[Node]) -> set[Node]:
    """These nodes, and what they are views of."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left.extend(node.all_input_nodes if node.op == "call_function" and _is_free(node) else ())
    return found


def _is_pure(node: Node) -> bool:
    """Whether a node is an operation that gives the same for the same inputs, and does nothing else."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, type(torch.ops.aten.add.Tensor)):
        return node.target is operator.getitem or isinstance(node.meta.get("val"), (int, torch.SymInt))
    return not node.is_impure() and torch.Tag.dynamic_output_shape not in node.target.tags


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_free(node: Node) -> bool:
    """Whether a node is a view, or no tensor."""
    return not _is_tensor(node) or getattr(node.target, "is_view", False)


def _is_worth_it(node: Node) -> bool:
    """Whether a node does more than fill memory: no constant, and no elementwise sum that is larger than its terms."""
    if not _is_tensor(node):
        return True
    sizes = [_size(source) for source in node.all_input_nodes if _is_tensor(source)]
    is_elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return bool(sizes) and (not is_elementwise or _size(node) in sizes)


def _size(node: Node) -> tuple[str, ...]:
    """The shape, to be compared without a guard on the symbols in it."""
    return tuple(map(str, node.meta["val"].shape))
