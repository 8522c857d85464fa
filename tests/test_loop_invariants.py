"""What a map computes from its arguments alone is computed once in a compiled solve."""

import collections

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from solvers import _compiled, solve

pytestmark = [
    pytest.mark.usefixtures("without_a_compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

calls: collections.Counter[str] = collections.Counter()


@torch.library.custom_op("implicit_tests::counted", mutates_args=())
def counted(x: torch.Tensor, label: str) -> torch.Tensor:
    calls[label] += 1
    return x.clone()


@counted.register_fake
def _(x, label):
    return torch.empty_like(x)


@pytest.fixture
def as_inductor(monkeypatch):
    """The graphs that Inductor would get, with its pass over loops, but not its code."""
    from solvers._loop_invariants import InvariantsFirst

    def run(graph, inputs):
        InvariantsFirst()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph.forward

    backend = aot_autograd(fw_compiler=run, decompositions=select_decomp_table())
    monkeypatch.setattr(_compiled, "BACKEND", lambda graph, inputs, **options: backend(graph, inputs))


def both(f, z0, solver, *args, **options):
    """The values of a compiled solve and of one that runs step by step, and how often each label was counted."""
    found = []
    for compile in (True, True, False):
        calls.clear()
        with torch.no_grad():
            found.append(solve(f, z0, solver, args=args, compile=compile, on_failure="ignore", **options))
        if len(found) == 2:
            counts = dict(calls)
    assert found[0].value.equal(found[1].value)
    assert not _compiled._refused
    assert found[1].num_steps.tolist() == found[2].num_steps.tolist()
    torch.testing.assert_close(found[1].value, found[2].value)
    return counts, int(found[1].num_steps.max())


@pytest.mark.parametrize("solver", ["anderson", pytest.param("broyden", marks=pytest.mark.long)])
def test_computed_once(as_inductor, double, solver):
    def f(z, x, w):
        return torch.tanh(0.5 * counted(z, "z") + counted(torch.sin(x) @ w, "x"))

    args = torch.randn(4, 3), torch.randn(3, 8)
    counts, num_steps = both(f, torch.zeros(4, 8), solver, *args, rtol=1e-9)
    assert num_steps > 5
    # In the first call, for z0, and in each graph; Broyden has a second one for when its room is used up.
    assert counts == {"z": num_steps, "x": 3 if solver == "broyden" else 2}
    if solver == "anderson":  # in a graph for all sizes of a batch as well
        counts, num_steps = both(f, torch.zeros(6, 8), solver, torch.randn(6, 3), args[1], rtol=1e-9)
        assert counts == {"z": num_steps, "x": 2}


def several(z, x):
    """More results than a loop has room for."""
    return 0.1 * torch.stack([z * (x + i).sin() for i in range(12)]).sum(dim=0) + x


def pairs(z, x):
    """Operations of several results, views, and a condition."""
    largest, where = x.max(dim=1, keepdim=True)
    halves = torch.sort(x, dim=1).values.chunk(2, dim=1)
    return torch.where(x > 0, 0.3 * z.cos(), 0.1 * z) + largest + torch.cat(halves[::-1], 1) + where


def constant(z, x):
    """Nothing is carried: what is returned is invariant, and a view."""
    return x.sin().T.contiguous().T


def outer(z, x):
    """A sum that is larger than its terms."""
    return 0.1 * (x.unsqueeze(2) + x.unsqueeze(1)).tanh().matmul(z.unsqueeze(2)).squeeze(2) + x


@pytest.mark.long
@pytest.mark.parametrize(
    ("f", "solver"),
    [(several, "anderson"), (pairs, "picard"), (constant, "picard"), (outer, "picard")],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_same_values(as_inductor, double, f, solver):
    both(f, torch.zeros(4, 6), solver, torch.randn(4, 6), rtol=1e-9)


@pytest.mark.long
def test_random_numbers_are_drawn_in_every_step(as_inductor, double):
    def f(z, x):
        return 0.5 * z + counted(x + 0.01 * torch.rand_like(x), "x")

    with torch.no_grad():
        calls.clear()
        x, options = torch.randn(4, 6), {"compile": True, "on_failure": "ignore", "max_steps": 12}
        solution = solve(f, torch.zeros(4, 6), "picard", args=(x,), rtol=1e-9, **options)
    assert calls["x"] == solution.num_evals == 12


@pytest.mark.long
def test_by_inductor(monkeypatch):
    monkeypatch.setattr(_compiled, "BACKEND", "inductor")

    def f(z, x):
        return torch.tanh(0.5 * counted(z, "z") + counted(torch.sin(x), "x"))

    counts, num_steps = both(f, torch.zeros(4, 8), "anderson", torch.randn(4, 8), rtol=1e-3)
    assert counts == {"z": num_steps, "x": 2}
