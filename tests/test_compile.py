"""torch.compile and torch.export: eager's values and gradients, in as few graphs as there are decisions."""

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from tanh_map import TanhMap
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicit import FixedPointLayer, Implicit, fixed_point
from solvers.linear import NeumannSeries

pytestmark = COMPILING_WARNINGS

STEPS = {"rtol": None, "atol": None, "max_steps": 6}
SERIES = Implicit(linear_solver=NeumannSeries(terms=12))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Graphs(list[torch.fx.GraphModule]):
    """A backend of torch.compile that keeps the graphs."""

    def __call__(self, module, inputs):
        self.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def compiled(function, *, fullgraph):
    graphs = Graphs()
    return torch.compile(function, backend=graphs, fullgraph=fullgraph), graphs


def assert_same(function, other, inputs, parameters=()):
    """Values and gradients, to ``inputs`` and ``parameters``."""
    results = []
    for call in (function, other):
        value = tree_leaves(call(*inputs))
        sources = [t for t in (*inputs, *parameters) if t.requires_grad]
        results.append([*value, *torch.autograd.grad(sum(leaf.sin().sum() for leaf in value), sources)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backward", ["unrolled", SERIES], ids=["unrolled", "implicit"])
@pytest.mark.parametrize(
    "solver",
    ["picard", pytest.param("anderson", marks=pytest.mark.long), pytest.param("broyden", marks=pytest.mark.long)],
)
def test_fixed_steps_are_one_graph_forward_and_backward(solver, backward):
    layer = FixedPointLayer(TanhMap(norm=True), solver=solver, backward=backward, **STEPS).eval()
    fast, graphs = compiled(layer, fullgraph=True)
    assert_same(layer, fast, [torch.randn(4, 3, requires_grad=True)], list(layer.parameters()))
    assert len(graphs) == 1
    with torch.no_grad():
        x = torch.randn(4, 3)
        assert torch.allclose(fast(x), layer(x), atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "backward", [pytest.param("unrolled", marks=pytest.mark.long), SERIES], ids=["unrolled", "implicit"]
)
def test_weights_that_move_in_training_are_constant_during_a_compiled_solve(backward):
    layers = [FixedPointLayer(TanhMap(norm=True), backward=backward, **STEPS) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    fast, _ = compiled(layers[1], fullgraph=True)
    for _ in range(2):
        x = torch.randn(4, 3)
        for layer, call in zip(layers, (layers[0], fast), strict=True):
            layer.zero_grad()
            call(x).sin().sum().backward()
        for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)
        for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


linear = nn.Linear(3, 3)
# Fixed and small: where Anderson's window is nearly singular, as one of 5 steps in 3 unknowns may be, the derivative of
# its steps magnifies rounding beyond any tolerance.
w = (torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) / 8).requires_grad_()


def of_module(backward, x):
    return fixed_point(lambda z, x: 0.5 * torch.tanh(linear(z) + x), torch.zeros(4, 3), x, backward=backward, **STEPS)


def of_result(backward, x):
    y = w.sin()
    return fixed_point(lambda z: torch.tanh(z @ y + x), torch.zeros(4, 3), backward=backward, **STEPS)


def of_pytree(backward, x):
    def f(z, inputs):
        return {"a": 0.3 * torch.sin(z["b"]) @ inputs["w"], "b": 0.4 * torch.cos(z["a"]) + inputs["x"][0] * inputs["k"]}

    z0 = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    return fixed_point(f, z0, {"w": w, "x": [x], "k": 2}, backward=backward, **STEPS)


@pytest.mark.long
@pytest.mark.parametrize("backward", ["unrolled", SERIES], ids=["unrolled", "series"])
@pytest.mark.parametrize(
    ("function", "captured"),
    [(of_module, list(linear.parameters())), (of_result, [w]), (of_pytree, [w])],
    ids=["module", "result", "pytree"],
)
def test_captured_tensors_get_their_gradients(function, captured, backward):
    fast, graphs = compiled(lambda x: function(backward, x), fullgraph=True)
    assert_same(lambda x: function(backward, x), fast, [torch.randn(4, 3, requires_grad=True)], captured)
    assert len(graphs) == 1


@pytest.mark.long
def test_captured_results_get_their_gradients_by_gmres():
    fast, graphs = compiled(lambda x: of_result("implicit", x), fullgraph=False)
    assert_same(lambda x: of_result("implicit", x), fast, [torch.randn(4, 3, requires_grad=True)], [w])
    assert len(graphs) == 2  # GMRES tests convergence, outside of the graphs of the solve and of what comes after


@pytest.mark.long
def test_gmres_breaks_the_graph_once():
    layer = FixedPointLayer(TanhMap(), **STEPS)
    fast, _ = compiled(lambda x: layer(x).sin(), fullgraph=False)
    x = torch.randn(4, 3, requires_grad=True)
    assert_same(lambda x: layer(x).sin(), fast, [x], list(layer.parameters()))
    # Counted in every frame that is on the stack.
    assert counters["graph_break"]
    assert all("function <function with_eager_adjoint" in r.replace("`", "") for r in counters["graph_break"])
    torch.compiler.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"take one that\s+does not, such as Implicit\(linear_solver"
    ):
        torch.compile(layer, fullgraph=True, backend="eager")(x)


@pytest.mark.long
def test_adjoint_of_a_compiled_layer_is_reported():
    layer = FixedPointLayer(TanhMap())
    fast, _ = compiled(lambda x: layer(x, return_solution=True), fullgraph=False)
    z, solution = fast(torch.randn(4, 3))
    assert solution.adjoint is None
    z.sum().backward()
    assert solution.adjoint.converged.all()


@pytest.mark.long
@pytest.mark.parametrize("norm", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "normalized"])
@pytest.mark.parametrize("backward", [pytest.param("unrolled", marks=pytest.mark.long), "implicit"])
def test_tolerance_breaks_at_the_test_alone(backward, norm):
    layer = FixedPointLayer(TanhMap(norm), solver="picard", backward=backward, rtol=1e-5).eval()
    fast, graphs = compiled(layer, fullgraph=False)
    parameters = list(layer.parameters())
    assert_same(layer, fast, [torch.randn(4, 3, requires_grad=True)], parameters)
    for reason in counters["graph_break"]:
        # PyTorch 2.11 does not trace context variables, in which records of solves are found.
        places = ("ToleranceTest", "_with_secant_ratio", "nonzero", "adjoint", "ContextVar")
        assert any(place in reason for place in places)
    for scale in (0.1, 0.3, 3.0):  # other numbers of steps
        assert_same(layer, fast, [torch.randn(4, 3) * scale], parameters)
    count = len(graphs)
    for scale in (0.01, 0.3, 5.0, 20.0):
        assert_same(layer, fast, [torch.randn(4, 3) * scale], parameters)
    assert len(graphs) == count
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="take a\\s+fixed number of\\s+steps|generic context"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(4, 3))


class Decisions(TorchDispatchMode):
    """Counts the numbers that are copied to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backward", ["unrolled", SERIES], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_fixed_steps_decide_nothing_on_the_host(solver, backward):
    """Compiled or not; on a GPU each would be a wait."""
    layer = FixedPointLayer(TanhMap(norm=True), solver=solver, backward=backward, **STEPS)
    with Decisions() as decisions:
        layer(torch.randn(4, 3)).sum().backward()
    assert decisions.count == 0
    with Decisions() as decisions:
        FixedPointLayer(TanhMap(), solver=solver, backward=backward)(torch.randn(4, 3))
    assert decisions.count > 0


def _second_derivative(function, x):
    gradient = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)[0]
    return torch.autograd.grad(gradient.sum(), x)


@pytest.mark.long
def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(4, 3, requires_grad=True)
    for backward, message in (("implicit", "has no second derivative"), (SERIES, "double backward")):
        fast, _ = compiled(FixedPointLayer(TanhMap(), backward=backward, **STEPS), fullgraph=False)
        with pytest.raises(RuntimeError, match=message):
            _second_derivative(fast, x)


@pytest.mark.long
@pytest.mark.parametrize("backward", ["unrolled", pytest.param("implicit", marks=pytest.mark.long)])
def test_transforms_inside_what_is_compiled(backward):
    def solved(w):
        return fixed_point(lambda z, w: torch.tanh(z @ w + 1), torch.zeros(4, 3), w, backward=backward, **STEPS).sin()

    gradient = torch.func.grad(lambda w: solved(w).sum())
    fast, _ = compiled(lambda w: gradient(w).cos(), fullgraph=False)
    assert torch.allclose(fast(w.detach()), gradient(w.detach()).cos(), atol=1e-6)


@pytest.mark.parametrize("backward", ["unrolled", "implicit"])
def test_exports(backward):
    layer = FixedPointLayer(TanhMap(norm=True), backward=backward, **STEPS).eval()
    x = torch.randn(4, 3)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    for size in (4, 7):
        x = torch.randn(size, 3)
        assert torch.allclose(exported.module()(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("options", [STEPS, {"rtol": 1e-5}], ids=["steps", "tolerance"])
def test_checkpointed_runs_outside_of_the_graph(options):
    layer = FixedPointLayer(TanhMap(norm=True), solver="picard", backward="checkpointed", **options).eval()
    fast, _ = compiled(lambda x: layer(x).sin(), fullgraph=False)
    x = torch.randn(4, 3, requires_grad=True)
    assert_same(lambda x: layer(x).sin(), fast, [x], list(layer.parameters()))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"For one graph use\s+Unrolled\(\)"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
