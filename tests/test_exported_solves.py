"""Solves to a tolerance as parts of larger graphs: exported, and inside of torch.compile."""

import math
import subprocess
import sys

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from tanh_map import TanhMap
from torch import nn

from implicit import FixedPointLayer, fixed_point
from solvers import _compiled, solve

pytestmark = COMPILING_WARNINGS


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    monkeypatch.setattr(_compiled, "BACKEND", "eager")


@pytest.fixture
def loops(monkeypatch):
    """The solves that run as compiled loops, in a list."""
    found, run = [], _compiled.run

    def noted(*arguments):
        course = run(*arguments)
        found.append(course)
        return course

    monkeypatch.setattr(_compiled, "run", noted)
    return found


@pytest.mark.long
@pytest.mark.parametrize("of_a_layer", [True, False])
def test_inside_of_a_larger_compiled_function(of_a_layer, loops):
    """The solve is a compiled loop between two graphs of the larger function."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    f = TanhMap()
    layer = FixedPointLayer(f, solver="picard", rtol=1e-6, compile=True)

    def function(x):
        y = x.sin()
        if of_a_layer:
            return layer(y).cos()
        return fixed_point(lambda z: f(z, y), torch.zeros_like(y), solver="picard", rtol=1e-6, compile=True).cos()

    outer = torch.compile(function, backend=backend)
    x = torch.randn(4, 3, requires_grad=True)
    first = outer(x)
    number = len(graphs)
    found = first, *torch.autograd.grad(outer(x).sum(), [x, *f.parameters()])
    assert 2 <= len(graphs) == number <= 3
    assert len(loops) == 2
    assert None not in loops
    expected = function(x), *torch.autograd.grad(function(x).sum(), [x, *f.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_bare_solve_inside_of_a_larger_compiled_function(loops):
    def function(x):
        return solve(lambda z: torch.cos(z) * x, x, "anderson", rtol=1e-5, compile=True).value.exp()

    x = torch.rand(4, 3)
    torch.testing.assert_close(torch.compile(function, backend="eager")(x), function(x))
    assert len(loops) == 2
    assert None not in loops


RUN_ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(x) for x in torch.load(sys.argv[2])], sys.argv[3])
assert "solvers" not in sys.modules
"""


class Logarithm(nn.Module):
    def forward(self, z, x):
        return torch.log(z + 0.5) + x


class Reporting(nn.Module):
    """A layer whose statuses and steps are further outputs."""

    def __init__(self, f, solver):
        super().__init__()
        self.layer = FixedPointLayer(f, solver=solver, rtol=1e-5, max_steps=30, on_failure="ignore")

    def forward(self, x):
        _, solution = self.layer(x, return_solution=True)
        return solution.value, solution.status, solution.num_steps


@pytest.mark.long
@pytest.mark.parametrize(
    ("f", "solver"),
    [(Logarithm(), "anderson"), (TanhMap(norm=True), "broyden")],
    ids=["anderson", "broyden"],
)
def test_exported_solves_run_elsewhere(f, solver, tmp_path):
    """With a dynamic batch, in a process that does not know the library, and by ONNX Runtime."""
    model = Reporting(f, solver).eval()
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (torch.randn(4, 3),), dynamic_shapes=(batch,))
    inputs = [torch.rand(1, 3) + 1, torch.linspace(-2, 1.5, 21).view(7, 3), torch.tensor([[math.nan] * 3, [1.0] * 3])]
    seen = set()

    def check(outputs):
        for x, (value, status, num_steps) in zip(inputs, outputs, strict=True):
            with torch.no_grad():
                _, expected = model.layer(x, return_solution=True)
            assert status.tolist() == expected.status.tolist()
            assert (num_steps - expected.num_steps).abs().max() <= 2
            torch.testing.assert_close(value, expected.value, rtol=1e-4, atol=1e-4, equal_nan=True)
            seen.update(expected.statuses())

    files = [tmp_path / name for name in ("program.pt2", "inputs.pt", "outputs.pt")]
    torch.export.save(exported, files[0])
    torch.save(inputs, files[1])
    subprocess.run([sys.executable, "-c", RUN_ELSEWHERE, *files], check=True, cwd=tmp_path)
    check(torch.load(files[2]))
    assert {"CONVERGED", "NONFINITE"} <= seen

    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript: pip install -e '.[dev]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what is exported: pip install -e '.[dev]'")
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    check([torch.from_numpy(out) for out in session.run(None, {source.name: x.numpy()})] for x in inputs)
