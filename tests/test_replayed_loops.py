"""Loops that are taken turn by turn, as on a GPU, end as those that are one graph."""

import contextlib
from typing import ClassVar
from unittest import mock

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit import fixed_point
from solvers import Anderson, Broyden, Newton, Picard, Stopping, _compiled, _cuda_graph, solve, solve_root
from solvers._cuda_graph import CaptureError

pytestmark = [
    pytest.mark.usefixtures("without_a_compiler"),
    COMPILING_WARNINGS,
]


@pytest.fixture
def captured(monkeypatch):
    """Takes turns on the CPU; how many loops were captured."""
    calls = []

    def replayed(call, device):
        calls.append(device)
        return call

    monkeypatch.setattr(_compiled, "REPLAYED_ON", ("cpu",))
    monkeypatch.setattr(_compiled, "Replayed", replayed)
    return calls


def alike(monkeypatch, call):
    """What a call returns with turns, after it was compared with what it returns with one graph."""
    with torch.no_grad():
        turns = call()
        with monkeypatch.context() as patch:
            patch.setattr(_compiled, "REPLAYED_ON", ())
            whole = call()
    assert not _compiled._refused
    for name in ("status", "num_steps", "num_evals"):
        assert torch.as_tensor(getattr(turns, name)).equal(torch.as_tensor(getattr(whole, name))), name
    for name in ("value", "residual", "error_estimate", "change"):
        torch.testing.assert_close(getattr(turns, name), getattr(whole, name), equal_nan=True)
    return turns


SOLVERS = [
    Picard(damping=0.9),
    Anderson(memory=3),
    Broyden(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_solves(captured, monkeypatch, double, solver):
    """Of samples that end at different steps, are lost on the way or never end, and need room more than once."""
    rate = torch.tensor([0.1, 0.5, 0.99, -0.6, 1.5, 0.8]).unsqueeze(1)
    shift = torch.randn(6, 7)
    shift[4], shift[5] = 1.0, -30.0

    def f(z, rate, shift):
        log = torch.log(z[5:] + 31)  # not a number where a step leads too far
        return torch.cat((rate[:5] * torch.sin(z[:5].flip(1)) + shift[:5] * (1 + (rate[:5] > 1) * z[:5].square()), log))

    for check_every in (1, 3):
        options = {"args": (rate, shift), "rtol": 1e-10, "max_steps": 60, "check_every": check_every}
        found = alike(
            monkeypatch,
            lambda options=options: solve(
                f, torch.zeros(6, 7), solver, batch_dims=1, on_failure="ignore", compile=True, **options
            ),
        )
        assert found.converged.any()
    assert len(captured) >= 2


@pytest.mark.long
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), exponent=st.floats(-30, 30), rate=st.floats(0.1, 3))
def test_random_maps(seed, exponent, rate):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(2.0**exponent, dtype=torch.float64)
    weight, x = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def call():
        args, options = (rate / 3 * weight, scale * x, scale), {"rtol": 1e-9, "max_steps": 40, "on_failure": "ignore"}
        return solve(
            lambda z, w, x, s: s * torch.tanh((z @ w) / s) + x,
            torch.zeros_like(x),
            Anderson(),
            args=args,
            compile=True,
            **options,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled, "REPLAYED_ON", ("cpu",))
        patch.setattr(_compiled, "Replayed", lambda call, device: call)
        alike(patch, call)


@pytest.mark.long
def test_the_first_turn_may_be_the_last(captured, monkeypatch):
    for max_steps in (1, 2, 3):
        for rtol in (1e6, 1e-6):
            alike(
                monkeypatch,
                lambda max_steps=max_steps, rtol=rtol: solve(
                    lambda z: 0.5 * z + 1,
                    torch.zeros(2, 3),
                    rtol=rtol,
                    max_steps=max_steps,
                    on_failure="ignore",
                    compile=True,
                ),
            )
    assert len(captured) == 1  # for the second of two turns


@pytest.mark.long
def test_roots(captured, monkeypatch, double):
    eccentricity, mean = 0.95 * torch.rand(50), 6 * torch.rand(50)
    found = alike(
        monkeypatch,
        lambda: solve_root(
            lambda z, e, m: z - e * torch.sin(z) - m,
            mean,
            Newton(),
            args=(eccentricity, mean),
            stopping=Stopping(rtol=1e-12),
            compile=True,
        ),
    )
    assert found.converged.all()
    assert captured


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.3, 0.75])
def test_gradients(captured, double, rate):
    weight, x = rate * torch.eye(4).roll(1, 0), torch.randn(5, 4, requires_grad=True)
    value = fixed_point(
        lambda z, w, x: torch.sin(z @ w) + x, torch.zeros(5, 4), weight, x, compile=True, rtol=1e-12, max_steps=200
    )
    captured.clear()
    (gradient,) = torch.autograd.grad(value.square().sum(), x)
    assert captured
    value = fixed_point(lambda z, w, x: torch.sin(z @ w) + x, torch.zeros(5, 4), weight, x, rtol=1e-12, max_steps=200)
    torch.testing.assert_close(gradient, torch.autograd.grad(value.square().sum(), x)[0])


@pytest.mark.long
def test_what_cannot_be_captured_goes_on_as_one_graph_and_is_not_tried_again(captured, monkeypatch):
    tried = []

    def fails(call, device):
        tried.append(call)
        raise CaptureError("It waits.")

    monkeypatch.setattr(_compiled, "Replayed", fails)

    def call():
        return solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), rtol=1e-6, compile=True)

    for _ in range(2):
        found = alike(monkeypatch, call)
        torch.testing.assert_close(found.value, torch.full((2, 3), 2.0), rtol=1e-5, atol=1e-5)
    assert len(tried) == 1


@pytest.mark.long
def test_states_above_the_limit_are_not_captured(captured, monkeypatch):
    monkeypatch.setattr(_compiled, "MOST_REPLAYED_BYTES", 23)
    with torch.no_grad():
        solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), rtol=1e-6, compile=True)
        assert not captured
        solve(lambda z: 0.5 * z + 1, torch.zeros(1, 3), rtol=1e-6, compile=True)
    assert len(captured) == 1


class Graph:
    """What PyTorch's graphs do, as far as a capture goes that may have failed."""

    log: ClassVar[list[str]] = []

    def capture_begin(self, pool=None, capture_error_mode=""):
        assert capture_error_mode == "thread_local"
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")

    def pool(self):
        return (1, 0)

    def replay(self):
        self.log.append("replay")


@pytest.mark.parametrize(
    "error", [RuntimeError("it waits"), torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr
)
def test_a_capture_that_fails_is_ended_and_its_generator_put_back(monkeypatch, error):
    generator = mock.Mock()
    stream = mock.MagicMock()
    for name, fake in {
        "Stream": lambda device: stream,
        "CUDAGraph": Graph,
        "current_stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "default_generators": [generator],
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_cuda_graph, "_PLACES", _cuda_graph._Places())
    device = torch.device("cuda", 0)
    _cuda_graph._PLACES.of[device] = _cuda_graph._Place(stream, Graph())
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: Graph.log.append((name, args)), raising=False)

    Graph.log.clear()
    replayed = _cuda_graph.Replayed(lambda: Graph.log.append("call"), device)
    replayed()
    assert Graph.log == ["begin", "call", "end", "replay"]
    assert not generator.graphsafe_set_state.called

    def fails():
        raise error

    Graph.log.clear()
    with pytest.raises(CaptureError if type(error) is RuntimeError else type(error)):
        _cuda_graph.Replayed(fails, device)
    pool = (0, (1, 0))
    assert Graph.log == ["begin", "end", ("_cuda_endAllocateToPool", pool), ("_cuda_releasePool", pool)]
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
