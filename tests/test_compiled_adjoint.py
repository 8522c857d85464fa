"""compile=True: the linear problem of the implicit backward mode has the answers of one that runs step by step."""

import dataclasses
import warnings

import pytest
import torch
from tanh_map import TanhMap
from torch._dynamo.utils import counters

from implicit import FixedPointLayer, Implicit, fixed_point
from solvers import NotCompiledWarning, _compiled, _compiled_adjoint, _series_graph
from solvers.linear import GMRES, LinearResult, LinearSolver, Richardson

pytestmark = [
    pytest.mark.usefixtures("without_a_compiler", "double"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def linear(rates):
    """(B, D) rates -> a map whose products with J' shrink each entry of each sample by its rate."""
    return lambda z, x: rates * z + x


def both(f, z0, *args, linear_solver=None, **options):
    """Gradients to the args and the adjoint solution, compiled and step by step."""
    found = []
    for compile in (True, False):
        inputs = tuple(arg.detach().clone().requires_grad_() for arg in args)
        mode = "implicit" if linear_solver is None else Implicit(linear_solver=linear_solver)
        with warnings.catch_warnings():
            warnings.simplefilter("error", NotCompiledWarning)
            kept = {"compile": compile, "backward": mode, "return_solution": True, "on_failure": "ignore", **options}
            value, solution = fixed_point(f, z0, *inputs, **kept)
            (value["a"] if isinstance(value, dict) else value).cos().sum().backward()
        found.append(([arg.grad for arg in inputs], solution.adjoint))
    assert not _compiled._refused
    return found


# Those that are fast, those whose steps run out, and slow ones.
RATES = torch.tensor([0.0, 0.1, 0.45, -0.6, 0.79, -0.85, 0.97], dtype=torch.float64)


def test_systems_of_all_rates():
    """Samples that are slow or out of steps go over to GMRES, and all of them meet the tolerance."""
    rates = RATES.unsqueeze(1) * torch.tensor([1.0, 0.9, -0.8])
    (compiled, adjoint), (eager, _) = both(linear(rates), torch.zeros(7, 3), torch.randn(7, 3), rtol=1e-11)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-8, atol=1e-9)
    assert adjoint.converged.all()
    assert (adjoint.residual <= 1e-12).all()
    assert isinstance(adjoint.solver, Richardson)
    assert repr(adjoint.solver) == repr(Richardson())


@pytest.mark.long
def test_the_same_steps_where_the_rate_is_given():
    rates = RATES.unsqueeze(1).expand(7, 3)
    solver = Richardson(max_rate=0.7, max_steps=12)
    (compiled, one), (eager, other) = both(
        linear(rates), torch.zeros(7, 3), torch.randn(7, 3), rtol=1e-6, linear_solver=solver
    )
    torch.testing.assert_close(compiled[0], eager[0])
    assert one.statuses() == other.statuses()
    assert "MAX_STEPS" in one.statuses()
    assert one.num_steps.tolist() == other.num_steps.tolist()
    assert one.num_evals == other.num_evals
    torch.testing.assert_close(one.residual, other.residual)


@pytest.mark.long
def test_pytrees_one_coupled_problem_other_solvers_and_nothing():
    def f(z, x, y):
        return {"a": 0.4 * torch.tanh(z["a"].flip(0)) + x, "b": 0.3 * z["a"].sum(dim=1) * y + 0.2 * z["b"]}

    z0 = {"a": torch.zeros(4, 3), "b": torch.zeros(4)}
    args = torch.randn(4, 3), torch.randn(4)
    (compiled, _), _ = both(linear(torch.zeros(0, 3)), torch.zeros(0, 3), torch.zeros(0, 3), rtol=1e-9)
    assert compiled[0].shape == (0, 3)
    for options in ({"batch_dims": 0}, {"batch_dims": 0, "linear_solver": GMRES()}):
        (compiled, _), (eager, _) = both(f, z0, *args, rtol=1e-9, **options)
        for one, other in zip(compiled, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalized"])
def test_layers(norm):
    graphs = []
    for _ in range(1 if norm else 3):  # each normalized module has a class of its own
        layer, gradients = FixedPointLayer(TanhMap(norm), rtol=1e-8, compile=True).eval(), []
        x = torch.randn(4, 3, requires_grad=True)
        for compile in (True, False):
            layer.compiled = compile
            layer(x).square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in layer.parameters())])
            x.grad = None
            layer.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert graphs[0] == graphs[-1]


@pytest.mark.long
def test_batches_of_all_sizes_take_one_more_graph():
    f, graphs = TanhMap(False).eval(), []
    for size in (4, 6, 3, 9):
        (compiled, adjoint), (eager, _) = both(f, torch.zeros(size, 3), torch.randn(size, 3), rtol=1e-8)
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)
        assert adjoint.converged.all()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3


@pytest.mark.long
def test_second_derivatives_and_transforms():
    x = torch.randn(2, 3, requires_grad=True)

    def solved(x):
        return fixed_point(linear(torch.full((2, 3), 0.6)), torch.zeros(2, 3), x, compile=True, rtol=1e-12).sin()

    assert torch.autograd.gradgradcheck(solved, x)


@pytest.mark.long
def test_by_inductor(monkeypatch):
    monkeypatch.setattr(_compiled, "BACKEND", "inductor")
    weight = 0.5 * torch.linalg.qr(torch.randn(6, 6))[0]

    def f(z, x):
        return x.sigmoid() * torch.sin(z @ weight) + x

    for size in (5, 5, 3, 7):
        (compiled, adjoint), (eager, _) = both(f, torch.zeros(size, 6), torch.randn(size, 6), rtol=1e-9)
        torch.testing.assert_close(compiled[0], eager[0], rtol=1e-8, atol=1e-9)
        assert adjoint.converged.all()


def test_what_cannot_be_compiled_runs_step_by_step_and_says_so(monkeypatch):
    def broken(*_):
        raise ValueError("no such luck")

    monkeypatch.setattr(_series_graph, "LOOP", dataclasses.replace(_series_graph.LOOP, start=broken))
    x = torch.randn(2, 3, requires_grad=True)
    value = fixed_point(lambda z, x: 0.4 * z + x, torch.zeros(2, 3), x, compile=True, rtol=1e-9)
    with pytest.warns(NotCompiledWarning, match="The linear solve of the gradient runs step by step"):
        value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 1 / 0.6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverse(LinearSolver):
    """Multiplies by a matrix that it holds."""

    matrix: torch.Tensor

    def run(self, matvec, b, tolerance=None):
        x = b @ self.matrix.T
        error = (b - matvec(x)).norm(dim=1)
        return LinearResult(x, (error > 1e-9).to(torch.int8), error, torch.ones_like(error).long(), error.unsqueeze(0))


def test_a_solver_that_holds_tensors():
    a, x = 0.3 * torch.randn(3, 3) + 0.95 * torch.eye(3), torch.randn(2, 3)
    solver = Richardson(otherwise=Inverse(matrix=torch.linalg.inv(torch.eye(3) - a.T)))
    (compiled, adjoint), (eager, _) = both(lambda z, x: z @ a.t() + x, x, x, linear_solver=solver, max_steps=2)
    torch.testing.assert_close(compiled, eager)
    assert adjoint.converged.all()


def test_only_its_own_class_is_compiled():
    class Mine(Richardson):
        pass

    solver = Mine()
    assert _compiled_adjoint.compiled_adjoint_solver(solver, None, None, (), None, batch_dims=1) is solver
