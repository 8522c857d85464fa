"""The driver loop: independence of samples, failures, what a Solution says, and what is refused."""

import math
import pickle
import warnings

import pytest
import torch

from solvers import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Picard,
    Solver,
    State,
    Status,
    get_solver,
    solve,
)
from solvers.testing import BANK

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "qr": Anderson(least_squares="qr"), "broyden": Broyden()}
all_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def affine(rate, offset):
    """z -> rate * z + offset, row by row: rate is (B, 1)."""
    return lambda z: rate * z + offset


@all_solvers
def test_a_sample_alone_and_among_harder_ones(solver):
    """Same number of steps, same answer to rounding."""
    problem = BANK["mixed"](torch.float64)
    options = {"rtol": 1e-8, "atol": 0, "max_steps": 3000, "on_failure": "raise"}
    together = solve(problem.f, problem.z0, solver, **options)
    assert len(together.num_steps.unique()) > 5
    for i in (0, 20, 45, 63):
        alone = solve(lambda z, i=i: problem.f(z.expand(64, -1))[i : i + 1], problem.z0[i : i + 1], solver, **options)
        assert alone.num_steps[0] == together.num_steps[i]
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-12, atol=1e-12)
        assert torch.allclose(alone.residual[0], together.residual[i], rtol=1e-4)


@all_solvers
def test_a_nan_sample_marks_itself_and_leaves_the_others_exact(solver):
    problem = BANK["tanh"](torch.float64)
    x = torch.zeros(8, 1, dtype=torch.float64)
    x[3] = math.nan

    def poisoned(z):
        return problem.f(z.repeat(16, 1))[:8] + x

    reference = solve(lambda z: problem.f(z.repeat(16, 1))[:8], problem.z0[:8], solver, rtol=1e-8, atol=0)
    with pytest.warns(ConvergenceWarning, match="NONFINITE: .*inf or nan"):
        solution = solve(poisoned, problem.z0[:8], solver, rtol=1e-8, atol=0)
    others = [i for i in range(8) if i != 3]
    assert reference.converged.all()
    assert Status(int(solution.status[3])) is Status.NONFINITE
    assert solution.num_steps[3] == 1
    assert solution.value[3].isnan().all()
    assert solution.residual[3] == math.inf
    assert (solution.status[others] == Status.CONVERGED).all()
    assert torch.equal(solution.value[others], reference.value[others])
    assert torch.equal(solution.num_steps[others], reference.num_steps[others])


def test_a_sample_that_turns_nan_keeps_its_best_value():
    calls = []

    def f(z):
        calls.append(z.clone())
        return torch.where(torch.tensor([[True], [len(calls) < 4]]), 0.5 * z + 1, math.nan)

    solution = solve(f, torch.zeros(2, 1), Picard(), rtol=1e-6, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert solution.value[1].item() == 1.75
    assert solution.num_steps[1] == 4
    # After the failure f sees that sample's best value, not nan.
    assert all(z.isfinite().all() for z in calls)


def test_a_sample_lost_at_once_is_held_at_its_start():
    seen = []

    def f(z):
        seen.append(z.clone())
        return torch.where(torch.tensor([[True], [False]]), 0.5 * z + 1, math.nan)

    solution = solve(f, torch.full((2, 1), 3.0), Picard(), rtol=1e-6, on_failure="ignore")
    assert solution.value[1].isnan().all()
    assert all(z[1].item() == 3.0 for z in seen)


@all_solvers
def test_finished_samples_are_frozen(solver):
    """f sees the value of a finished sample from then on, whatever the solver makes of the others."""
    seen = []

    def f(z):
        seen.append(z.clone())
        return torch.tensor([[0.1], [0.95]], dtype=torch.float64) * torch.tanh(z) + 1

    z0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = solve(f, z0, solver, rtol=1e-10, atol=0, max_steps=2000, on_failure="raise")
    stopped = int(solution.num_steps[0])
    assert stopped < int(solution.num_steps[1])
    assert all(torch.equal(z[0], solution.value[0]) for z in seen[stopped:])


def test_diverging_map_is_marked_and_returns_its_best():
    problem = BANK["expansive"](torch.float64)
    solution = solve(problem.f, problem.z0, Picard(), max_steps=200, on_failure="ignore")
    assert (solution.status == Status.DIVERGED).all()
    assert int(solution.num_steps.max()) < 40
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("solver", [Anderson(memory=20), Broyden()], ids=str)
def test_accelerated_solvers_solve_the_expansive_map(solver):
    problem = BANK["expansive"](torch.float64)
    solution = solve(problem.f, problem.z0, solver, rtol=1e-10, atol=0, max_steps=200, on_failure="raise")
    assert (solution.value - problem.solution).norm() < 1e-7 * problem.solution.norm()


@all_solvers
def test_too_few_steps(solver):
    problem = BANK["linear 0.9"](torch.float64)
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS: .*Raise max_steps"):
        solution = solve(problem.f, problem.z0, solver, rtol=1e-10, max_steps=3)
    assert (solution.status == Status.MAX_STEPS).all()
    assert (solution.num_steps == 3).all()
    assert solution.num_evals == 3


def test_stagnation_of_a_cycle():
    problem = BANK["planes"](torch.float64)
    solution = solve(problem.f, problem.z0, Picard(), rtol=1e-6, atol=0, max_steps=1000, on_failure="ignore")
    assert solution.status.tolist() == [Status.STAGNATED]
    assert 50 < solution.num_evals < 200


def test_on_failure_raise_carries_the_solution():
    problem = BANK["linear 0.9"](torch.float64)
    with pytest.raises(ConvergenceError, match="MAX_STEPS") as caught:
        solve(problem.f, problem.z0, Picard(), max_steps=3, on_failure="raise")
    assert caught.value.solution.num_evals == 3
    with pytest.raises(ConvergenceError):
        caught.value.solution.raise_if_failed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = solve(problem.f, problem.z0, Picard(), max_steps=3, on_failure="ignore")
    assert ignored.failed.all()


def test_the_warning_is_the_same_every_time():
    """So that Python shows it once for each place, not at every step of a training."""
    texts = set()
    for samples in (1, 5):
        with pytest.warns(ConvergenceWarning) as caught:
            solve(lambda z: 0.9 * z + 1, torch.zeros(samples, 1), Picard(), max_steps=samples + 2)
        texts.add(str(caught[0].message))
    assert len(texts) == 1


def test_best_iterate_is_returned():
    """The value is f of the iterate with the smallest residual, not of the last."""
    images = iter([1.0, 1.1, 1.11, 5.0, 9.0])
    solution = solve(
        lambda z: torch.full_like(z, next(images)), torch.zeros(1, 1), Picard(), max_steps=5, on_failure="ignore"
    )
    assert solution.value.item() == pytest.approx(1.11)
    assert solution.residual.item() == pytest.approx(0.01 / 1.11, rel=1e-4)


@all_solvers
def test_history_is_the_residual_of_every_step(solver):
    problem = BANK["mixed"](torch.float64)
    iterates = []

    def f(z):
        iterates.append(z.clone())
        return problem.f(z)

    solution = solve(f, problem.z0, solver, rtol=1e-6, atol=0, max_steps=2000, history=True)
    steps = int(solution.num_steps.max())
    assert solution.history.shape == (steps, 64) == (len(iterates), 64)
    for k in (0, 1, 4, steps - 1):
        z, fz = iterates[k], problem.f(iterates[k])
        expected = (fz - z).norm(dim=1) / fz.norm(dim=1)
        running = solution.num_steps > k
        assert torch.allclose(solution.history[k][running], expected[running], rtol=1e-6)
    last = solution.history[solution.num_steps - 1, torch.arange(64)]
    assert torch.equal(last, solution.residual)


def test_history_with_a_fixed_number_of_steps():
    problem = BANK["linear 0.5"](torch.float64)
    solution = solve(problem.f, problem.z0, Picard(), rtol=None, atol=None, max_steps=4, history=True)
    assert solution.history.shape == (4, 64)
    assert torch.equal(solution.residual, solution.history[-1])
    assert (solution.history[0] == 1).all()
    assert (solution.status == Status.UNTESTED).all()
    assert not solution.failed.any()


def test_tolerances():
    """norm(f(z) - z) <= atol + rtol * norm(f(z)), root mean square: neither size nor scale matter to rtol."""
    f = affine(0.5, 1.0)  # |f(z) - z| = 2^-k from z = 0, f(z) -> 2
    for size in (1, 100):
        z0 = torch.zeros(1, size, dtype=torch.float64)
        assert solve(f, z0, Picard(), rtol=0, atol=2.0**-10, max_steps=100).num_evals == 11
        assert solve(f, z0, Picard(), rtol=0, atol=0.99 * 2.0**-10, max_steps=100).num_evals == 12
        assert solve(f, z0, Picard(), rtol=None, atol=2.0**-10, max_steps=100).num_evals == 11
        assert solve(f, z0, Picard(), rtol=2.0**-11, atol=None, max_steps=100).num_evals == 12
    tiny = solve(affine(0.5, 1e-30), z0, Picard(), rtol=2.0**-11, atol=0, max_steps=100)
    assert tiny.num_evals == 12


@all_solvers
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_batch_dims(solver, batch_dims):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    solution = solve(
        lambda z, x: 0.5 * torch.cos(z) + x, torch.zeros_like(x), solver, args=(x,), batch_dims=batch_dims, history=True
    )
    batch = x.shape[:batch_dims]
    assert solution.status.shape == solution.residual.shape == solution.num_steps.shape == batch
    assert solution.history.shape[1:] == batch
    assert solution.value.shape == x.shape
    assert torch.allclose(solution.value, 0.5 * torch.cos(solution.value) + x, rtol=1e-3)


@all_solvers
def test_pytree_state(solver):
    """The same problem as one tensor and as a nested pytree: same steps, same answer."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6
    b = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    whole = solve(lambda z: torch.tanh(z @ a.T) + b, torch.zeros_like(b), solver, rtol=1e-10, atol=0)

    def split(z):
        return {"x": z[:, :4].reshape(-1, 2, 2), "y": (z[:, 4:5], [z[:, 5]])}

    def f(tree):
        z = torch.cat((tree["x"].flatten(1), tree["y"][0], tree["y"][1][0].unsqueeze(1)), dim=1)
        return split(torch.tanh(z @ a.T) + b)

    parts = solve(f, split(torch.zeros_like(b)), solver, rtol=1e-10, atol=0)
    assert torch.equal(parts.num_steps, whole.num_steps)
    expected = split(whole.value)
    assert parts.value["x"].shape == (5, 2, 2)
    assert torch.allclose(parts.value["x"], expected["x"], rtol=1e-12, atol=1e-12)
    assert torch.allclose(parts.value["y"][1][0], expected["y"][1][0], rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_in_a_pytree():
    z0 = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float32))
    solution = solve(lambda z: (0.5 * z[0] + z[1].double(), 0.5 * z[1] + 1), z0, "anderson", rtol=1e-6)
    assert solution.value[0].dtype == torch.float64
    assert solution.value[1].dtype == torch.float32
    assert torch.allclose(solution.value[0], torch.full((2, 3), 4.0, dtype=torch.float64), rtol=1e-5)


@all_solvers
def test_non_contiguous_states(solver):
    x = torch.randn(5, 4, dtype=torch.float64).T
    solution = solve(lambda z: (0.5 * torch.sin(z.T) + x.T).T, torch.zeros(5, 4, dtype=torch.float64).T, solver)
    assert solution.converged.all()
    assert torch.allclose(solution.value, 0.5 * torch.sin(solution.value) + x, rtol=1e-3)


def test_start_is_not_changed():
    for solver in SOLVERS.values():
        z0 = torch.full((2, 2), 3.0)
        solve(lambda z: 0.5 * z, z0, solver, atol=1e-3)
        assert (z0 == 3).all()


def test_a_users_own_solver():
    """What CONTRIBUTING says: a dataclass with init and step."""
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(Solver):
        """Two Picard steps at a time."""

        def init(self, f, z0):
            return State(z0, f(z0))

        def step(self, f, state):
            z = f(state.fz)
            return State(z, f(z))

    solution = solve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), Twice(), rtol=1e-3)
    assert solution.converged.all()
    assert solution.num_evals == 2 * int(solution.num_steps) - 1


def test_gradients_flow_through_the_steps():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for solver in SOLVERS.values():
        solution = solve(
            lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(4, 3).double(), solver, args=(x,), rtol=1e-13, atol=0
        )
        (gradient,) = torch.autograd.grad(solution.value.sum(), x)
        assert torch.allclose(gradient, 1 / (1 - 0.5 * torch.cos(solution.value)), rtol=1e-6)


# What is refused.


def fails(error, match, f=lambda z: 0.5 * z, z0=None, solver="picard", **options):
    with pytest.raises(error, match=match):
        solve(f, torch.ones(2, 3) if z0 is None else z0, solver, **options)


def test_what_the_map_returns_is_checked():
    fails(ValueError, r"got \(2, 2\) for a state of shape \(2, 3\)", f=lambda z: z[:, :2])
    fails(TypeError, "got torch.float64 for a state of torch.float32", f=lambda z: z.double())
    fails(ValueError, "on cpu, where the state is; got meta", f=lambda z: z.to("meta"))
    fails(ValueError, "must return the structure of the state", f=lambda z: (z, z))
    fails(TypeError, "must return tensors, got a float", f=lambda z: 1.0)
    fails(RuntimeError, "changed its argument z in place", f=lambda z: z.mul_(0.5))


def test_an_error_in_the_map_comes_through():
    fails(ZeroDivisionError, "division by zero", f=lambda z: z / 0 if z is None else 1 / 0)


def test_states_are_checked():
    fails(TypeError, r"real and floating-point, got torch.complex64.*view_as_real", z0=torch.ones(2, 3) + 1j)
    fails(TypeError, "real and floating-point, got torch.int64", z0=torch.ones(2, 3, dtype=torch.int64))
    fails(ValueError, r"batch_dims=3 but a state tensor has shape \(2, 3\)", batch_dims=3)
    fails(ValueError, "batch_dims must be an integer >= 0, got -1", batch_dims=-1)
    fails(ValueError, "has no tensors", z0=())
    fails(TypeError, "got a str in it", z0=(torch.ones(2), "x"))
    fails(
        ValueError,
        r"share their first 1 dimensions.*got \(2, 3\).*and \(3, 3\)",
        z0=(torch.ones(2, 3), torch.ones(3, 3)),
    )


def test_options_are_checked():
    fails(ValueError, "rtol must be a number >= 0 or None, or a pytree of such, got -1", rtol=-1)
    fails(ValueError, "atol must be a number >= 0 or None, or a pytree of such, got nan", atol=math.nan)
    fails(ValueError, "max_steps must be a positive integer, got 0", max_steps=0)
    fails(ValueError, "max_steps must be a positive integer, got 2.0", max_steps=2.0)
    fails(ValueError, 'on_failure must be "warn", "raise" or "ignore", got \'log\'', on_failure="log")
    fails(
        ValueError,
        "no solver 'secant'. The known ones: picard, anderson, broyden, newton, newton_krylov",
        solver="secant",
    )
    fails(TypeError, r"args must be a tuple .* got a Tensor. For one, write args=\(x,\)", args=torch.ones(1))
    fails(TypeError, "solver must be a solvers.Solver object or a name, got 3", solver=3)


def test_get_solver():
    assert get_solver("anderson", memory=7) == Anderson(memory=7)
    with pytest.raises(TypeError, match="Options go with a name"):
        get_solver(Picard(), damping=0.5)
    with pytest.raises(TypeError, match="Picard has no option 'memory'. Its options: damping"):
        get_solver("picard", memory=3)


def test_statuses_have_messages():
    assert all(len(status.message) > 20 for status in Status)
    assert Status(0) is Status.CONVERGED
    assert pickle.loads(pickle.dumps(Status.DIVERGED)) is Status.DIVERGED


def test_summary_names_the_worst_sample_by_its_index():
    rate = torch.tensor([[[0.1], [0.2]], [[0.9], [0.3]]])
    solution = solve(affine(rate, 1.0), torch.zeros(2, 2, 1), "picard", batch_dims=2, max_steps=6, on_failure="ignore")
    assert "worst residual" in solution.summary()
    assert "sample (1, 0)" in solution.summary()


@all_solvers
def test_fixed_steps_compile_to_one_graph(solver):
    weight = torch.randn(4, 4) / 4
    fixed = {"rtol": None, "atol": None, "max_steps": 4}

    def run(x):
        return solve(lambda z, x: torch.tanh(z @ weight) + x, x, solver, args=(x,), **fixed).value

    x = torch.randn(3, 4)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), run(x), atol=1e-6)
