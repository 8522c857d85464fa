"""Models in the forms that others run: compiled, exported, as ONNX."""

import copy

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from small_models import relative_error, small, trained_somewhat

from implicit import Implicit
from solvers.linear import NeumannSeries

pytestmark = COMPILING_WARNINGS

# All with a fixed number of steps.
MODELS = {
    "paper": {},
    "eight steps": {"n_iter": 8},
    "anderson": {"n_iter": 4, "solver": "anderson"},
    "broyden": {"n_iter": 4, "solver": "broyden"},
    "certified": {"contraction": "certified"},
    "implicit": {"n_iter": 4, "backward": Implicit(linear_solver=NeumannSeries(terms=6))},
}
ON_ONNX = ("eight steps", "anderson", "broyden", "certified")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def images(size):
    return torch.randn(size, 3, 16, 16)


@pytest.mark.parametrize("name", ["paper", pytest.param("implicit", marks=pytest.mark.long)])
def test_training_compiles_to_one_graph(name):
    """Outputs, gradients and the power iteration are those of eager mode."""
    model = trained_somewhat(small(num_blocks=1, n_power=2, **MODELS[name])).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = images(2)
        model.zero_grad()
        other.zero_grad()
        found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert relative_error(b.grad, a.grad) < 1e-4, key
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "name", ["paper", *(pytest.param(name, marks=pytest.mark.long) for name in MODELS if name != "paper")]
)
def test_exported_program(name):
    model = trained_somewhat(small(**MODELS[name])).eval()
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for size in (1, 2, 5):
        x = images(size)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_a_solver_without_a_loop_is_not_exported():
    model = small(rtol=1e-3, n_iter=4, solver="squarem").eval()
    with pytest.raises(ValueError, match="got rtol=0.001, is exported as a loop, for which Squarem.* has no form"):
        torch.export.export(model, (images(2),))


@pytest.mark.long
def test_a_solve_to_a_tolerance_is_exported():
    model = trained_somewhat(small(rtol=1e-3, n_iter=8, num_blocks=1)).eval()
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for size in (1, 5):
        x = images(size)
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("name", ["paper", *(pytest.param(name, marks=pytest.mark.long) for name in ON_ONNX)])
def test_onnx(name):
    pytest.importorskip("onnxscript", reason="the exporter needs onnxscript: pip install -e '.[dev]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what is exported: pip install -e '.[dev]'")
    model = trained_somewhat(small(num_blocks=1, **MODELS[name])).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(model, (images(2),), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    for size in (1, 2, 5):
        x = images(size)
        (found,) = session.run(None, {source.name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
