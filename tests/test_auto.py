"""The automatic solver: as few calls as the best of the others, and an answer where any of them has one."""

import functools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from implicit import fixed_point
from solvers import Anderson, Auto, Broyden, Iteration, Picard, Status, solve
from solvers.methods.method_choice import ANDERSON, BROYDEN, FAST, NEWTON, PICARD, MethodChoice
from solvers.testing import BANK, NONLINEAR, REAL_MAPS
from solvers.testing.problems import imlp

OTHERS = [Picard(), Anderson(), Anderson(memory=10), Broyden()]


@functools.cache
def bank_problem(name, dtype):
    return imlp(dtype, rows=64) if name == "imlp" else BANK[name](dtype)


def calls(f, z0, solver, rtol, max_steps=200):
    """Calls of the map until every sample has converged; inf if one has not."""
    solution = solve(f, z0, solver, rtol=rtol, atol=0, max_steps=max_steps, on_failure="ignore")
    return solution.num_evals if solution.converged.all() else math.inf


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
# Of nonnormal, with transients of 1e25, rounding decides who solves it.
@pytest.mark.parametrize("problem", [name for name in BANK if name != "nonnormal"])
def test_needs_few_calls_on_the_bank(problem, dtype, rtol):
    bank = bank_problem(problem, dtype)
    best = min(calls(bank.f, bank.z0, solver, rtol) for solver in OTHERS)
    assert best < 200
    assert calls(bank.f, bank.z0, Auto(), rtol) <= 1.15 * best + 1


@pytest.mark.parametrize(("problem", "most"), [("linear 0.99", 42), ("planes", 17), ("expansive", 18)])
def test_a_long_window_needs_fewer_calls_than_any_other_solver(problem, most):
    bank = bank_problem(problem, torch.float32)
    assert calls(bank.f, bank.z0, Auto(), 1e-5) <= most < min(calls(bank.f, bank.z0, s, 1e-5) for s in OTHERS)


def random_maps(lipschitz):
    """(f, z0) with 4 samples of up to 30 unknowns: contractions, linear and not; or linear maps that expand."""

    def make(seed, size, rate, digits, h):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(size, size, dtype=torch.float64, generator=generator)
        shift = 10**digits * torch.randn(4, size, dtype=torch.float64, generator=generator)
        radius = torch.linalg.matrix_norm(a, 2) if lipschitz < 1 else torch.linalg.eigvals(a).abs().max()
        a = rate / radius * a
        hypothesis.assume(lipschitz < 1 or torch.linalg.cond(torch.eye(size, dtype=a.dtype) - a) < 50)
        return lambda z: torch.addmm(shift, h(z), a.T), torch.zeros_like(shift)

    smooth_and_kinked = [lambda z: z, torch.tanh, torch.sin, torch.abs]
    return st.builds(
        make,
        st.integers(0, 2**32),
        st.integers(1, 30),
        st.floats(0, lipschitz) if lipschitz < 1 else st.floats(1, lipschitz),
        st.floats(-3, 3),
        st.sampled_from(smooth_and_kinked if lipschitz < 1 else smooth_and_kinked[:1]),
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(random_maps(lipschitz=0.95) | random_maps(lipschitz=2.0))
def test_needs_few_calls_on_random_maps(problem):
    f, z0 = problem
    # A bound of inf would let a failure pass; where the others fail as well there is none.
    best = min(calls(f, z0, solver, 1e-8) for solver in OTHERS)
    assert calls(f, z0, Auto(), 1e-8) <= 1.15 * best + 2


def test_fast_samples_take_plain_steps_and_nothing_else():
    bank = bank_problem("imlp", torch.float64)
    auto, picard = (solve(bank.f, bank.z0, s, rtol=1e-10, atol=0, on_failure="raise") for s in (Auto(), Picard()))
    assert auto.num_evals == picard.num_evals
    assert torch.equal(auto.value, picard.value)
    assert auto.state.window is None


def methods(f, z0, **options):
    """The strongest method that each sample comes to before it is done, and the solution."""
    iteration = Iteration(f, z0, Auto(), rtol=1e-10, atol=0, max_steps=100, **options)
    strongest = iteration.state.choice.method
    while not iteration.done:
        iteration.step()
        active = iteration.solution().status == Status.MAX_STEPS
        strongest = torch.where(active, torch.maximum(strongest, iteration.state.choice.method), strongest)
    return strongest.tolist(), iteration.solution()


def test_each_sample_has_its_own_method():
    """One map in one unknown, from fast to expanding: what a sample needs is no matter of the others."""
    start = torch.tensor([[0.0], [0.5], [4.0], [5.0]], dtype=torch.float64)
    slope = torch.tensor([[0.01], [0.9], [1.0], [1.0]], dtype=torch.float64)

    def f(z, slope, start):
        return torch.where(slope < 1, slope * torch.sin(z) + 1, torch.exp(z) - 2)

    together, solution = methods(f, start, args=(slope, start))
    assert together == [FAST, ANDERSON, NEWTON, NEWTON]
    assert solution.converged.all()
    for i in range(4):
        row = slice(i, i + 1)
        alone, solution_alone = methods(f, start[row], args=(slope[row], start[row]))
        assert alone == together[row]
        assert torch.equal(solution_alone.num_steps, solution.num_steps[row])
        assert torch.allclose(solution_alone.value, solution.value[row], rtol=1e-9)
    compact = solve(f, start, Auto(), args=(slope, start), rtol=1e-10, atol=0, max_steps=100, compact=True)
    assert torch.equal(compact.num_steps, solution.num_steps)
    assert torch.allclose(compact.value, solution.value, rtol=1e-9)


def test_broydens_method_follows_an_idle_window():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    w = 5 * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(4, 64, dtype=torch.float64, generator=generator)
    strongest, solution = methods(lambda z: torch.tanh(torch.addmm(x, z, w.T)), torch.zeros_like(x))
    assert BROYDEN in strongest
    assert solution.converged.any()


def column(first, last):
    return torch.linspace(first, last, 9, dtype=torch.float64).unsqueeze(1)


HARD = {
    "cubic": (lambda z: 1 + z - z**3, column(-3, 5)),
    "logistic, cycling": (lambda z: 3.5 * z * (1 - z), column(0.05, 0.95)),
    "exponential": (lambda z: z.exp() - 2, column(-3, 5)),
    "kink": (lambda z: 1 - 2 * z.abs(), column(-3, 3)),
}


@pytest.mark.parametrize("name", HARD)
def test_solves_what_defeats_plain_iteration(name):
    f, z0 = HARD[name]
    solution = solve(f, z0, Auto(), rtol=1e-10, atol=0, max_steps=100, on_failure="raise")
    assert torch.allclose(f(solution.value), solution.value, atol=1e-8)
    assert calls(f, z0, Picard(), 1e-10) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_to_infinity_are_taken_back(dtype):
    """The third call of exp(z^2) / 5 overflows; by Newton's method it goes down from the start."""
    z0 = torch.tensor([[2.7], [0.1]], dtype=dtype)
    solution = solve(lambda z: torch.exp(z * z) / 5, z0, Auto(), rtol=1e-5, atol=0, max_steps=200, on_failure="raise")
    assert solution.value.isfinite().all()
    picard = solve(lambda z: torch.exp(z * z) / 5, z0, Picard(), rtol=1e-5, atol=0, on_failure="ignore")
    assert picard.failed[0]


def test_the_state_has_no_unit():
    """A power of two as the unit changes no bit but the exponents, and not one step, for any of the methods."""
    for f, z0 in [*HARD.values(), (BANK["mixed"](torch.float64).f, BANK["mixed"](torch.float64).z0)]:

        def in_units(z, unit, f=f):
            return unit * f(z / unit)

        units = (1.0, 2.0**-27, 2.0**27)
        options = {"rtol": 1e-8, "max_steps": 100}
        counts = [solve(in_units, c * z0, Auto(), args=(c,), **options).num_steps.tolist() for c in units]
        assert counts[0] == counts[1] == counts[2]


@pytest.mark.long
@pytest.mark.parametrize(("scale", "least"), [(1, 23), (10, 22)])
@pytest.mark.parametrize("sign", ["minus", "plus"])
def test_solves_classical_systems_of_equations(sign, scale, least):
    solved = 0
    for problem in NONLINEAR.values():
        z0 = scale * problem.x0
        solution = solve(getattr(problem, sign), z0, Auto(), rtol=1e-8, max_steps=1000, on_failure="ignore")
        size = torch.linalg.vector_norm(solution.value).clamp_min(torch.linalg.vector_norm(z0)).clamp_min(1)
        is_root = torch.linalg.vector_norm(problem.F(solution.value)) <= 1e-6 * size
        assert is_root or not solution.converged.all()
        solved += int(solution.converged.all())
    assert solved >= least


def test_returns_to_plain_iteration_and_back():
    """Extrapolated scalings of a transport plan are negative; after plain steps extrapolation does no harm."""
    problem = REAL_MAPS["plain sinkhorn 0.01"](torch.float64)
    iteration = Iteration(problem.f, problem.z0, Auto(), rtol=1e-6, atol=0, max_steps=200)
    seen = [set() for _ in problem.z0[0]]
    while not iteration.done:
        iteration.step()
        for methods_of_one, method in zip(seen, iteration.state.choice.method.tolist(), strict=True):
            methods_of_one.add(method)
    assert iteration.solution().converged.all()
    assert any({ANDERSON, PICARD} <= methods_of_one for methods_of_one in seen)


class Looks(TorchDispatchMode):
    """Counts copies of values to the host, of which ``tolist`` is none on the CPU."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_one_look_at_the_host_per_step(monkeypatch):
    """Fast samples beside slow ones, and samples that need Broyden's method."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    w = w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(6, 64, dtype=torch.float64, generator=generator)
    gain = torch.tensor([[0.05], [0.5], [0.95], [4.0], [5.0], [6.0]], dtype=torch.float64)

    def f(z):
        return torch.tanh(torch.addmm(x, gain * z, w.T))

    auto, state, looks, steps, seen = Auto(), None, Looks(), 0, set()
    tolist = torch.Tensor.tolist

    def counted(tensor):
        looks.number += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with looks:
        state = auto.init(f, torch.zeros_like(x))
        for steps in range(1, 60):
            state = auto.step(f, state)
            assert looks.number == steps
            methods = set(tolist(state.choice.method))
            seen |= methods
            if NEWTON in methods:
                break
    assert {ANDERSON, BROYDEN, PICARD} <= seen
    assert steps > 20


@pytest.mark.parametrize("name", ["linear 0.9", "mixed", "tanh", "expansive", "H-equation", "steep"])
def test_calm_steps_are_judged_as_all_others(monkeypatch, name):
    """The shorter way through a step without events changes no bit of the answer and no method of a sample."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 20, dtype=torch.float64, generator=generator)
    x = torch.randn(12, 20, dtype=torch.float64, generator=generator)
    w = torch.linspace(0.02, 5, 12, dtype=torch.float64).view(-1, 1, 1) * w / torch.linalg.matrix_norm(w, 2)

    def steep(z):
        return torch.tanh(x + torch.einsum("bij,bj->bi", w, z))

    f, z0 = (
        (steep, torch.zeros_like(x)) if name == "steep" else (BANK[name](torch.float64).f, BANK[name](torch.float64).z0)
    )
    taken = []

    def solved():
        solution = solve(f, z0, Auto(), rtol=1e-9, atol=0, max_steps=100, on_failure="ignore")
        choice = solution.state.choice
        return solution.num_evals, (solution.status, solution.num_steps, solution.value, choice.method, choice.idle)

    after_calm = MethodChoice.after_calm
    with monkeypatch.context() as patch:
        patch.setattr(
            MethodChoice, "after_calm", lambda *args, **options: taken.append(1) or after_calm(*args, **options)
        )
        num_evals, results = solved()
    assert taken

    def judged(self, state, needs, *step):
        return self._judge(state, *step)

    monkeypatch.setattr(Auto, "_settled_step", judged)
    num_evals_judged, results_judged = solved()
    assert num_evals == num_evals_judged
    assert all(torch.equal(a, b) for a, b in zip(results, results_judged, strict=True))


def test_a_map_that_is_never_finite_is_reported():
    z0 = torch.zeros(2, 3)
    poison = torch.tensor([[1.0], [torch.nan]])
    solution = solve(lambda z: 0.5 * z + poison, z0, Auto(), on_failure="ignore")
    assert [Status(code) for code in solution.status.tolist()] == [Status.CONVERGED, Status.NONFINITE]


def test_what_cannot_be_solved_is_not_pursued_for_ever():
    """z + 1 + |z| has no fixed point: the driver's patience ends it, and Newton's method has not taken many calls."""
    z0 = torch.zeros(1, 4, dtype=torch.float64)
    solution = solve(lambda z: z + 1 + z * z, z0, Auto(), rtol=1e-10, atol=0, max_steps=500, on_failure="ignore")
    assert solution.failed.all()
    assert solution.num_evals < 300


def test_fixed_steps_go_on_at_the_solution():
    bank = bank_problem("cos", torch.float64)
    solution = solve(bank.f, bank.z0, Auto(), rtol=None, atol=None, max_steps=60)
    assert torch.allclose(solution.value, bank.solution, atol=1e-12)
    assert solution.num_evals == 60


def test_gradient_by_the_implicit_mode():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    z = fixed_point(lambda z, x: 3 * torch.sin(z) + x, x.detach() * 0 + 2, x, solver="auto", rtol=1e-12)
    z.sum().backward()
    assert torch.allclose(x.grad, 1 / (1 - 3 * torch.cos(z)), rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"Auto\(memory=...\) must be a positive integer, got 0"):
        Auto(memory=0)
    with pytest.raises(TypeError, match="must be a linear solver such as .*got 3"):
        Auto(linear_solver=3)
    with pytest.raises(ValueError, match="Auto"):
        fixed_point(torch.cos, torch.ones(1, 1), solver="auto", backward="unrolled")
