"""Maps that mix samples or change from call to call: a solve that takes its samples for independent does not lie."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit import FixedPointLayer
from solvers import ConvergenceWarning, Status, Stopping, solve, solve_root
from solvers.linear import GMRES, BiCGStab, NormalCG, Richardson, get_linear_solver, linear_solve

SOLVERS = ("picard", "anderson", "broyden", "squarem", "auto")
pytestmark = pytest.mark.usefixtures("double")


def chain(count=10):
    """Each sample is pushed by the one before it, and only the first one has an input."""
    shift, source = torch.diag(torch.ones(count - 1), -1), torch.zeros(count, 3)
    source[0] = 1.0
    return lambda z: torch.relu(0.9 * (shift @ z) + source)


def is_solved(f, solution, rtol):
    """(B,) bool: which samples are fixed points of the whole map."""
    image = f(solution.value)
    return (image - solution.value).norm(dim=1) <= 3 * rtol * image.norm(dim=1).clamp_min(1e-12)


def assert_true(f, solution, rtol):
    assert is_solved(f, solution, rtol)[solution.status == Status.CONVERGED].all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_chain_is_not_solved_by_its_first_link(solver):
    f = chain()
    solution = solve(f, torch.zeros(10, 3), solver, on_failure="ignore")
    assert_true(f, solution, 1e-4)
    assert "UNSETTLED" in solution.statuses()
    assert (solution.residual[solution.status == Status.UNSETTLED] > 1e-4).all()
    with pytest.warns(ConvergenceWarning, match=r"UNSETTLED: .*\nf mixes samples: .* batch_dims=0"):
        solve(f, torch.zeros(10, 3), solver)
    whole = solve(f, torch.zeros(10, 3), solver, batch_dims=0)
    torch.testing.assert_close(whole.value[:, 0], 0.9 ** torch.arange(10.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_compiled_solves_notice_it_too(solver, without_a_compiler):
    f = chain()
    solution = solve(f, torch.zeros(10, 3), solver, compile=True, on_failure="ignore")
    assert_true(f, solution, 1e-4)
    assert "UNSETTLED" in solution.statuses()


@given(st.integers(0, 10**6), st.sampled_from(SOLVERS), st.floats(0.01, 1.0), st.booleans())
def test_samples_of_any_mixing_map_that_count_as_converged_are(seed, solver, strength, relu):
    generator = torch.Generator().manual_seed(seed)
    mixing, inner = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (7, 4))
    mixing, inner = (matrix / torch.linalg.matrix_norm(matrix, 2) for matrix in (mixing, inner))
    source = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    source[torch.rand(7, generator=generator) < 0.5] = 0.0
    bend = torch.relu if relu else torch.tanh

    def f(z):
        return bend((0.5 * (1 - strength) * z + 0.9 * strength * (mixing @ z)) @ inner + source)

    solution = solve(f, torch.zeros(7, 4), solver, on_failure="ignore")
    assert_true(f, solution, 1e-4)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["newton", "newton_krylov", "anderson", "auto"]),
    st.floats(0.01, 1.5),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_roots_of_any_mixing_system_that_count_as_found_are(seed, solver, strength, size, linear):
    generator = torch.Generator().manual_seed(seed)
    mixing, source = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (5, size))
    mixing /= torch.linalg.matrix_norm(mixing, 2)

    def F(z):  # noqa: N802
        return z + strength * (mixing @ z) + (0.0 if linear else 0.3 * z**3) - source

    solution = solve_root(F, torch.ones(5, size), solver, on_failure="ignore", stopping=Stopping(rtol=1e-5))
    if solution.converged.all():
        assert F(solution.value).norm() <= 1e-3 * source.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_coupled_unknowns_taken_for_samples_are_reported(compile, without_a_compiler):
    matrix = torch.tensor([[4.0, 1.0], [2.0, 5.0]])
    with pytest.warns(ConvergenceWarning, match=r"UNSETTLED: .*\nF mixes samples: .* batch_dims=0"):
        solution = solve_root(lambda z: matrix @ z - 1, torch.ones(2), compile=compile)
    assert "UNSETTLED" in solution.statuses()
    assert (solution.residual[solution.status == Status.UNSETTLED] > 1e-4).all()
    whole = solve_root(lambda z: matrix @ z - 1, torch.ones(2), batch_dims=0)
    torch.testing.assert_close(matrix @ whole.value, torch.ones(2))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_roots_where_other_roots_make_nan_are_reported(compile, without_a_compiler):
    def F(z):  # noqa: N802
        return z * z - 2 + torch.where((z - 2**0.5).abs().amin() < 1e-9, math.nan, 0.0)

    start = torch.tensor([[1.0], [30.0]])
    solution = solve_root(F, start, compile=compile, on_failure="ignore")
    assert not solution.converged.all()


def test_samples_without_a_root_keep_their_own_report():
    """Beside others, whose roots are judged again."""
    shift = torch.tensor([[-2.0], [1.0], [-3.0]])
    problem = {"args": (shift,), "on_failure": "ignore"}
    start = torch.full((3, 1), 1.3)
    whole, alone = (solve_root(lambda z, c: z * z + c, start, compact=compact, **problem) for compact in (False, True))
    assert whole.statuses() == alone.statuses()
    assert whole.converged.tolist() == [True, False, True]
    torch.testing.assert_close(whole.residual, alone.residual)


def test_mixing_that_costs_no_digits_is_reported_and_leaves_the_statuses():
    rate = torch.linspace(0.1, 0.8, 8).unsqueeze(1)

    def f(z):
        return rate * z + 1 + 1e-7 * z.sum(0)

    with pytest.warns(ConvergenceWarning, match="converged for every sample by itself, but f mixes samples"):
        assert solve(f, torch.zeros(8, 2), "picard").converged.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(f, torch.zeros(8, 2), "picard", on_failure="ignore")
        solve(lambda z: rate * z + 1, torch.zeros(8, 2), "picard")


def test_map_that_changes_is_told_from_one_that_mixes():
    rate = torch.linspace(0.1, 0.8, 8).unsqueeze(1)

    def f(z):
        return rate * z + 1 + 1e-6 * torch.rand(8, 2)

    with pytest.warns(ConvergenceWarning, match="but f changes from call to call: .*implicit.check_map"):
        solve(f, torch.zeros(8, 2), "picard")


@pytest.mark.parametrize("solver", ["anderson", "squarem", "broyden", "auto", "newton", "newton_krylov"])
def test_a_sample_ends_alike_beside_any_other(solver):
    def f(z):
        return 0.3 * z * z + 0.3

    starts = torch.linspace(-30, 30, 41).unsqueeze(1)
    for mates in ([[0.3]], [[50.0]], [[0.3], [50.0]]):
        for start in starts:
            alone = solve(f, start.unsqueeze(0), solver, on_failure="ignore")
            beside = solve(f, torch.cat((start.unsqueeze(0), torch.tensor(mates))), solver, on_failure="ignore")
            assert alone.status[0] == beside.status[0]
            assert alone.num_steps[0] == beside.num_steps[0]
            assert torch.equal(alone.value[0], beside.value[0])


@pytest.mark.parametrize("solver", ["newton", "newton_krylov"])
def test_newton_returns_what_it_has_tested(solver):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(5, 5, generator=generator, dtype=torch.float64) / 5**0.5
        bias = torch.randn(5, generator=generator, dtype=torch.float64)
        unit = 10 ** (-3 * torch.rand(5, generator=generator, dtype=torch.float64))

        def f(z, weight=weight, bias=bias, unit=unit):
            return unit * torch.tanh(1.5 * (z / unit) @ weight + bias)

        solution = solve(f, torch.ones(1, 5), solver, rtol=1e-2, on_failure="ignore")
        if solution.converged.all():
            assert is_solved(f, solution, 1e-2 / 2.9)


class TestLinearSystems:
    """Operators that couple the systems of a batch."""

    @pytest.mark.parametrize("solver", [GMRES(), BiCGStab(), NormalCG(), Richardson(), GMRES(restart=5)], ids=repr)
    def test_what_counts_as_solved_is(self, solver):
        solved = 0
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            size = 40 * 6
            coupling = torch.randn(size, size, generator=generator, dtype=torch.float64)
            scale = 10 ** (-2 * torch.rand(6, 1, generator=generator, dtype=torch.float64))
            coupling = 0.6 * coupling / torch.linalg.matrix_norm(coupling, 2)
            b = scale * torch.randn(6, 40, generator=generator, dtype=torch.float64)
            solution = linear_solve(
                lambda x, a=coupling: x - (x.flatten() @ a).view(6, 40), b, solver, rtol=1e-6, on_failure="ignore"
            )
            error = b - solution.value + (solution.value.flatten() @ coupling).view(6, 40)
            met = error.norm(dim=1) <= 3e-6 * b.norm(dim=1)
            assert met[solution.converged].all()
            solved += int(solution.converged.sum())
        assert solved or isinstance(solver, NormalCG | Richardson)

    def test_a_value_that_overflows_is_not_finite(self):
        for dtype, b, a in ((torch.float32, 1e25, 1e-20), (torch.float64, 1e200, 1e-200)):
            for solver in ("dense", "cg", "gmres", "richardson"):
                right = torch.full((2, 2), b, dtype=dtype)
                right[1] = a
                solution = linear_solve(lambda x, a=a: a * x, right, get_linear_solver(solver), on_failure="ignore")
                assert solution.statuses()[0] in ("NONFINITE", "BREAKDOWN")
                assert solution.value[1].isfinite().all()


def test_gradient_of_a_mixing_map_is_right_or_reported():
    reported = 0
    for seed in range(12):
        torch.manual_seed(seed)
        attention = torch.nn.MultiheadAttention(8, 2)  # over dimension 0, which is the batch
        linear = torch.nn.Linear(8, 8)

        def f(z, x, attention=attention, linear=linear):
            h = z.unsqueeze(1)
            return torch.tanh(0.7 * linear(z) + attention(h, h, h, need_weights=False)[0].squeeze(1) + x)

        x, weight = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            z = FixedPointLayer(f)(x)
            (grad,) = torch.autograd.grad((z * weight).sum(), x)
        exact = FixedPointLayer(f, batch_dims=0, rtol=1e-10, max_steps=200)(x)
        (truth,) = torch.autograd.grad((exact * weight).sum(), x)
        reported += bool(shown)
        assert shown or (grad - truth).norm() < 2e-3 * truth.norm()
    assert reported
