"""The solvers of torchdeq and SciPy: they keep the contract, go the way that they go alone, and leave no thread."""

import copy
import gc
import pickle
import sys
import threading
import time

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer
from solvers import Anderson, Iteration, Status, get_solver, solve
from solvers.adapters import SciPyAnderson, TorchDEQAnderson
from solvers.adapters._foreign import ForeignSolve
from solvers.testing import BANK, SolverConformance
from solvers.testing.row_contractions import RowContractions

# SciPy warns of ill-conditioned systems, which are no news past convergence.
pytestmark = pytest.mark.filterwarnings("ignore:.*ll-conditioned matrix")

SMALL = ("cos", "contractive 2x2")
# Name -> options, and attributes of the suite.
ROWS = {
    "torchdeq:fixed_point_iter": ({}, {}),
    "torchdeq:simple_fixed_point_iter": ({"damping": 0.8}, {}),
    "torchdeq:anderson": ({"memory": 5}, {"max_steps": 1000}),
    "torchdeq:broyden": ({}, {"movable": False}),
    "scipy:anderson": ({}, {}),
    "scipy:broyden1": ({}, {}),
    # With "lgmres", its default, it needs 255 calls for a problem of three unknowns.
    "scipy:krylov": ({"method": "gmres"}, {"movable": False}),
    "scipy:df-sane": ({}, {}),
    "scipy:hybr": ({}, {"problems": SMALL, "movable": False}),
}
# Slow rows, each beside a quicker one of the same package.
LONG = {"torchdeq:simple_fixed_point_iter", "scipy:anderson", "scipy:broyden1"}


def made(name, **options):
    """The solver, where its package is installed."""
    pytest.importorskip(name.partition(":")[0], reason=f"{name} needs a package that is not installed")
    return get_solver(name, **options)


class TestAdapters(SolverConformance):
    @pytest.fixture(
        autouse=True, params=[pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in ROWS]
    )
    def _row(self, request):
        options, attributes = ROWS[request.param]
        self.solver = made(request.param, **options)
        for name, value in attributes.items():
            setattr(self, name, value)


class BoomError(Exception):
    pass


def booms_at(call, problem):
    """The map, but that its call of this number raises."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        if calls == call:
            raise BoomError("of the map")
        return problem(z)

    return f


def num_threads():
    return sum(thread.name == "foreign solve" for thread in threading.enumerate())


def threads_end(left=0):
    """Whether only so many threads are left soon; those that are collected take a moment to end."""
    deadline = time.monotonic() + 10
    while num_threads() > left and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    return num_threads() == left


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_no_thread_is_left_by_a_solve(name):
    solver, problem = made(name), RowContractions.make()
    for options in ({}, {"max_steps": 3}, {"rtol": None, "atol": None, "max_steps": 30}):
        solution = solve(problem, problem.start, solver, on_failure="ignore", **options)
        assert num_threads() == 0
        # Nothing in it stands for a thread, and another solve may begin from it.
        assert torch.equal(pickle.loads(pickle.dumps(solution)).value, copy.deepcopy(solution).value)
        assert solver.step(problem, solution.state).z.shape == solution.value.shape
        assert threads_end()


@pytest.mark.parametrize("name", ROWS)
def test_threads_end_with_what_holds_them(name):
    solver, problem = made(name), RowContractions.make()
    iteration = Iteration(problem, problem.start, solver, rtol=0, atol=0)
    assert num_threads() == 0
    iteration.step()
    state = solver.step(problem, solver.init(problem, problem.start))
    threads = 1 if name.startswith("torchdeq") else 6
    assert num_threads() == 2 * threads
    del iteration
    del state
    assert threads_end()


@pytest.mark.parametrize("name", ["scipy:anderson", "torchdeq:anderson"])
def test_finished_samples_take_their_threads_along(name):
    solver, problem = made(name), RowContractions.make()
    seen = []

    def f(z, *maps):
        threads_end(left=1 if name.startswith("torchdeq") else len(z))
        seen.append((len(z), num_threads()))
        return RowContractions(*maps)(z)

    args = (problem.rate, problem.growth, problem.shift)
    solve(f, problem.start, solver, args=args, compact=True, max_steps=500)
    assert seen[0] == (6, 0)
    assert seen[1][0] == 6 > seen[-1][0]
    assert all(threads == (1 if name.startswith("torchdeq") else rows) for rows, threads in seen[1:])


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("name", ROWS)
def test_what_the_map_raises_comes_through(name, call):
    problem = RowContractions.make()
    with pytest.raises(BoomError, match="of the map") as raised:
        solve(booms_at(call, problem), problem.start, made(name), rtol=0, atol=0)
    assert raised.traceback[-1].name == "f"
    # While the error, and with it every frame, is still held.
    assert num_threads() == 0


def test_what_a_foreign_solver_raises_comes_through():
    def run(f):
        if f(1) == 2:
            raise BoomError("of the solver")

    solve = ForeignSolve(run)
    assert solve.point == 1
    with pytest.raises(BoomError, match="of the solver") as raised:
        solve.resume(2)
    assert raised.traceback[-1].name == "run"
    solve.resume(3)
    solve.close()
    assert threads_end()


def test_a_foreign_solver_cannot_go_back():
    solver, problem = made("scipy:anderson"), RowContractions.make()
    state = solver.init(problem, problem.start)
    solver.step(problem, state)
    with pytest.raises(RuntimeError, match="SciPyAnderson has already stepped from this state"):
        solver.step(problem, state)


class Recorded:
    """A map that keeps the points at which it was called."""

    def __init__(self, f):
        self.f = f
        self.points = []

    def __call__(self, z, tau=1.0):
        self.points.append(z.detach().clone())
        return self.f(z)


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"])
def test_goes_the_way_of_torchdeq(method):
    solver = made(f"torchdeq:{method}")
    bank = BANK["linear 0.9"](torch.float64)
    alone, here = Recorded(bank.f), Recorded(bank.f)
    sys.modules["torchdeq.solver"].get_solver(method)(alone, bank.z0, max_iter=50, tol=1e-4, stop_mode="rel")
    steps = len(alone.points)
    assert steps > 20
    solution = solve(here, bank.z0, solver, rtol=None, atol=None, max_steps=steps)
    assert solution.num_evals == steps
    assert all(map(torch.equal, here.points, alone.points))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("anderson", {"fatol": 1e-9, "jac_options": {"alpha": 1.0}}),
        ("broyden1", {"fatol": 1e-9, "jac_options": {"alpha": 1.0}}),
        ("krylov", {"fatol": 1e-9}),
        ("df-sane", {"fatol": 1e-9, "ftol": 0}),
        ("hybr", {}),
    ],
)
def test_goes_the_way_of_scipy(method, options):
    """Every row goes through the points of its own ``scipy.optimize.root``, bit for bit, to its answer."""
    solver, problem = made(f"scipy:{method}"), RowContractions.make(batch=3)
    root = sys.modules["scipy.optimize"].root
    here = Recorded(problem)
    solution = solve(here, problem.start, solver, rtol=None, atol=None, max_steps=120)
    for i in range(3):
        alone = Recorded(problem.select(torch.tensor([i])))
        sign = -1 if method == "df-sane" else 1

        def residual(x, f=alone, sign=sign):
            z = torch.from_numpy(x.copy()).unsqueeze(0)
            return sign * (f(z) - z).squeeze(0).numpy()

        answer = root(residual, problem.start[i].numpy(), method=method, options=options)
        assert answer.success
        assert 5 < len(alone.points) < 120
        assert all(torch.equal(there[i], z.squeeze(0)) for there, z in zip(here.points, alone.points, strict=False))
        assert torch.allclose(solution.value[i], torch.from_numpy(answer.x), atol=1e-6)


def test_one_singular_row_is_no_matter_of_the_others():
    """In float32 a large residual that does not change makes torchdeq's matrix singular, ridge or not."""
    solver = made("torchdeq:anderson")
    shift = torch.tensor([[1.0, 2.0], [300.0, 400.0], [3.0, 4.0]])
    rate = torch.tensor([[0.5], [1.0], [0.5]])
    get = sys.modules["torchdeq.solver"].get_solver("anderson")
    with pytest.raises(torch.linalg.LinAlgError):
        get(lambda z: rate * z + shift, torch.zeros(3, 2))
    solution = solve(lambda z: rate * z + shift, torch.zeros(3, 2), solver, max_steps=200, on_failure="ignore")
    assert [Status(s) for s in solution.status.tolist()] == [Status.CONVERGED, Status.STAGNATED, Status.CONVERGED]
    others = torch.tensor([0, 2])
    alone = solve(lambda z: 0.5 * z + shift[others], torch.zeros(2, 2), solver, max_steps=200)
    assert torch.equal(solution.num_steps[others], alone.num_steps)
    assert torch.allclose(solution.value[others], alone.value, rtol=1e-6)


def test_a_row_for_which_scipy_gives_up_stays_where_it_was():
    """A map that is nan but at the start: SciPy's Newton method raises, and ends there for that row alone."""
    solver = made("scipy:krylov")

    def f(z):
        lost = torch.tensor([[True], [False]]) & (z != 0).any(dim=1, keepdim=True)
        return torch.where(lost, torch.nan, 0.5 * torch.cos(z) + 1)

    solution = solve(f, torch.zeros(2, 3), solver, max_steps=200, rtol=1e-6, on_failure="ignore")
    assert [Status(s) for s in solution.status.tolist()] == [Status.NONFINITE, Status.CONVERGED]
    assert torch.equal(solution.value[0], torch.full((3,), 1.5))


@pytest.mark.parametrize("name", ["scipy:krylov", "scipy:anderson", "torchdeq:broyden"])
def test_layer_has_the_gradients_of_our_own(name):
    made(name)
    linear = nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.mul_(0.8 / torch.linalg.matrix_norm(linear.weight, 2))
    x = torch.randn(4, 6, dtype=torch.float64)
    gradients = []
    for solver in (Anderson(), name):
        layer = FixedPointLayer(lambda z, x: torch.tanh(linear(z)) + x, solver=solver, rtol=1e-10, atol=0)
        inputs = x.clone().requires_grad_()
        loss = layer(inputs).square().sum()
        gradients.append(torch.autograd.grad(loss, (inputs, linear.weight, linear.bias)))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["scipy:anderson", "scipy:hybr", "torchdeq:anderson"])
def test_f_sees_the_dtype_of_the_state(name):
    """The points that SciPy asks for in float64 are rounded, and the state holds what f was called with."""
    solver, problem = made(name), RowContractions.make(dtype=torch.float32)
    seen = Recorded(problem)
    state = solver.init(seen, problem.start)
    for _ in range(5):
        state = solver.step(seen, state)
        assert state.z.dtype == seen.points[-1].dtype == torch.float32
        assert torch.equal(state.z, seen.points[-1])
        assert torch.equal(state.fz, problem(state.z))


@pytest.mark.parametrize(
    ("name", "module"), [("torchdeq:anderson", "torchdeq.solver"), ("scipy:krylov", "scipy.optimize")]
)
def test_missing_package_names_the_extra(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ImportError, match=rf"needs .*: pip install 'implicit-layers\[{package}\]'"):
        get_solver(name)


def test_names_and_options():
    assert made("torchdeq:anderson", memory=4) == TorchDEQAnderson(memory=4)
    assert made("scipy:anderson", memory=4) == SciPyAnderson(memory=4)
    with pytest.raises(
        ValueError, match="no solver 'scipy:newton'. Did you mean .*The known ones: picard, .*scipy:krylov"
    ):
        get_solver("scipy:newton")
    with pytest.raises(TypeError, match="SciPyAnderson has no option 'memroy'. Did you mean 'memory'"):
        get_solver("scipy:anderson", memroy=4)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("torchdeq:anderson", "memory", 1),
        ("torchdeq:anderson", "ridge", -1.0),
        ("torchdeq:anderson", "damping", 0.0),
        ("torchdeq:broyden", "memory", None),
        ("torchdeq:fixed_point_iter", "damping", 2.0),
        ("scipy:anderson", "memory", 0),
        ("scipy:anderson", "damping", -1.0),
        ("scipy:anderson", "line_search", "cruz"),
        ("scipy:broyden1", "memory", 1),
        ("scipy:broyden1", "reduction_method", "none"),
        ("scipy:krylov", "method", "cg"),
        ("scipy:krylov", "rdiff", 0.0),
        ("scipy:df-sane", "line_search", "armijo"),
        ("scipy:df-sane", "sigma_0", 0.0),
        ("scipy:hybr", "factor", 1000.0),
    ],
)
def test_bad_options_are_named(name, option, value):
    made(name)
    with pytest.raises(ValueError, match=rf"{option}=...\) must be .*got {value!r}"):
        get_solver(name, **{option: value})


def test_too_many_rows_for_scipy():
    solver = made("scipy:anderson")
    with pytest.raises(ValueError, match="at most 1024 samples at once, a thread for each, and got 1025"):
        solve(torch.cos, torch.zeros(1025, 2), solver)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scipy:krylov", "torchdeq:anderson"])
def test_on_a_stream_of_its_own(name):
    solver, problem = made(name), RowContractions.make()
    options = {"rtol": 1e-9, "max_steps": 200, "on_failure": "raise"}
    here = solve(problem, problem.start, solver, **options)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = RowContractions(problem.rate.cuda(), problem.growth.cuda(), problem.shift.cuda())
        solution = solve(there, there.start, solver, **options)
        assert torch.allclose(solution.value.cpu(), here.value, rtol=1e-6)
