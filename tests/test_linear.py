"""The linear solvers against dense linear algebra, and their statuses."""

import pytest
import torch

from solvers import ConvergenceError, ConvergenceWarning, Status
from solvers.linear import CG, GMRES, BiCGStab, NeumannSeries, Richardson, linear_solve


def systems(dtype, batch=8, size=24):
    """(batch, size, size) matrices from well to badly conditioned, and right-hand sides."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(0.8, 3, batch).view(-1, 1, 1)
    a = 0.15 * torch.randn(batch, size, size, generator=generator) + shift * torch.eye(size)
    return a.to(dtype), torch.randn(batch, size, generator=generator).to(dtype)


def product(a):
    return lambda x: (a @ x.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_agrees_with_dense_solves(dtype, rtol):
    a, b = systems(dtype)
    solution = linear_solve(product(a), b, GMRES(rtol=rtol), on_failure="raise", history=True)
    exact = torch.linalg.solve(a, b)
    condition = torch.linalg.cond(a)
    assert ((solution.value - exact).norm(dim=1) <= rtol * condition * exact.norm(dim=1)).all()
    true_residual = (b - product(a)(solution.value)).norm(dim=1) / b.norm(dim=1)
    assert torch.allclose(solution.residual, true_residual, rtol=1e-2, atol=1e-7 if dtype == torch.float32 else 1e-15)
    assert solution.num_evals == int(solution.num_steps.max()) + 1
    assert solution.history.shape == (int(solution.num_steps.max()), 8)
    assert len(solution.num_steps.unique()) > 1


def test_steps_are_those_of_exact_gmres():
    """With k distinct eigenvalues GMRES ends in k steps."""
    for k in (1, 2, 5):
        d = torch.arange(1.0, k + 1, dtype=torch.float64).repeat(4)
        solution = linear_solve(lambda x, d=d: d * x, torch.ones(1, 4 * k, dtype=torch.float64), GMRES(rtol=1e-12))
        assert solution.num_steps.item() == k


def test_residual_estimates_decrease_and_are_true():
    a, b = systems(torch.float64)
    solution = linear_solve(product(a), b, GMRES(rtol=1e-10), history=True)
    assert (solution.history[1:] <= solution.history[:-1] * (1 + 1e-10)).all()
    for steps in (3, 9):
        stopped = linear_solve(product(a), b, GMRES(rtol=1e-10, max_steps=steps), history=True, on_failure="ignore")
        assert torch.allclose(stopped.history[-1], stopped.residual, rtol=1e-6)
        assert torch.allclose(stopped.history, solution.history[:steps], rtol=1e-8)


@pytest.mark.parametrize("restart", [5, 10])
def test_restarts(restart):
    a, b = systems(torch.float64)
    a = a + 2 * torch.eye(24)
    solution = linear_solve(product(a), b, GMRES(restart=restart, rtol=1e-12, max_steps=500), on_failure="raise")
    assert torch.allclose(solution.value, torch.linalg.solve(a, b), rtol=1e-9)
    assert int(solution.num_steps.max()) > restart


def test_a_system_alone_and_among_harder_ones():
    a, b = systems(torch.float64)
    together = linear_solve(product(a), b, GMRES(rtol=1e-10))
    for i in range(8):
        alone = linear_solve(product(a[i : i + 1]), b[i : i + 1], GMRES(rtol=1e-10))
        assert alone.num_steps[0] == together.num_steps[i]
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-10)


def test_pytrees_and_batch_dims():
    a, b = systems(torch.float64)
    flat = linear_solve(product(a), b, GMRES(rtol=1e-10)).value

    def tree_product(tree):
        y = product(a)(torch.cat((tree["left"].flatten(1), tree["right"]), dim=1))
        return {"left": y[:, :20].reshape(8, 4, 5), "right": y[:, 20:]}

    tree = linear_solve(tree_product, {"left": b[:, :20].reshape(8, 4, 5), "right": b[:, 20:]}, GMRES(rtol=1e-10)).value
    assert torch.allclose(tree["left"].flatten(1), flat[:, :20])
    one = linear_solve(product(a), b, GMRES(rtol=1e-10, max_steps=300), batch_dims=0)
    assert one.status.shape == ()
    assert torch.allclose(one.value, flat, rtol=1e-6)


def test_zero_right_hand_side_and_empty_batch():
    solution = linear_solve(lambda x: 2 * x, torch.zeros(2, 3), GMRES())
    assert solution.converged.all()
    assert (solution.value == 0).all()
    assert solution.num_evals == 0
    assert linear_solve(lambda x: 2 * x, torch.zeros(0, 3), GMRES()).value.shape == (0, 3)


def test_singular_systems():
    """Consistent ones are solved, inconsistent ones break down with the least-squares residual, none spoils another."""
    d = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 0, 1], [torch.nan, 0, 0]], dtype=torch.float64)
    solution = linear_solve(lambda x: d * x, b, GMRES(), on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.BREAKDOWN, Status.NONFINITE]
    assert torch.allclose(solution.value[0], torch.tensor([1, 0.5, 0], dtype=torch.float64))
    assert solution.residual[1].item() == pytest.approx(3**-0.5)
    assert solution.value[3].isnan().all()
    poles = linear_solve(lambda x: x / d, b[:2], GMRES(), on_failure="ignore")
    assert (poles.status == Status.NONFINITE).all()


def test_indefinite_and_nilpotent():
    swap = torch.tensor([[0.0, 1], [1, 0]])
    assert torch.equal(
        linear_solve(lambda x: x @ swap.T, torch.tensor([[1.0, 0]]), GMRES()).value, torch.tensor([[0.0, 1]])
    )
    nilpotent = torch.tensor([[0.0, 1], [0, 0]])
    failed = linear_solve(lambda x: x @ nilpotent.T, torch.tensor([[0.0, 1]]), GMRES(), on_failure="ignore")
    assert Status(int(failed.status)) is Status.BREAKDOWN


def test_too_few_steps_and_stagnation():
    a, b = systems(torch.float64)
    with pytest.warns(ConvergenceWarning, match="linear solve did not converge.*\n.*MAX_STEPS"):
        linear_solve(product(a), b, GMRES(max_steps=2))
    with pytest.raises(ConvergenceError) as caught:
        linear_solve(product(a), b, GMRES(max_steps=2), on_failure="raise")
    assert caught.value.solution.num_steps.tolist() == [2] * 8
    # A cyclic shift: GMRES makes no progress before the last step, so that restarting never does.
    shift = linear_solve(lambda x: x.roll(1, 1), torch.eye(6)[:1], GMRES(restart=3), on_failure="ignore")
    assert Status(int(shift.status)) is Status.STAGNATED
    below_floor = linear_solve(product(a.float()), b.float(), GMRES(rtol=1e-12, max_steps=1000), on_failure="ignore")
    assert set(below_floor.status.tolist()) <= {Status.STAGNATED, Status.CONVERGED}
    assert (below_floor.residual < 1e-5).all()


def test_refusals():
    with pytest.raises(ValueError, match="matvec must return the shape of the state"):
        linear_solve(lambda x: x[:, :1], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"GMRES\(restart=...\) must be a positive integer, got 0"):
        GMRES(restart=0)
    with pytest.raises(ValueError, match="rtol=-1"):
        GMRES(rtol=-1)
    with pytest.raises(TypeError, match="no option 'tol'"):
        GMRES(tol=1e-3)


# BiCGStab and the Neumann series.


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_bicgstab_agrees_with_dense_solves(dtype, rtol):
    a, b = systems(dtype)
    a = a + torch.eye(24, dtype=dtype)
    solution = linear_solve(product(a), b, BiCGStab(rtol=rtol), on_failure="raise", history=True)
    exact = torch.linalg.solve(a, b)
    assert ((solution.value - exact).norm(dim=1) <= rtol * torch.linalg.cond(a) * exact.norm(dim=1)).all()
    true_residual = (b - product(a)(solution.value)).norm(dim=1) / b.norm(dim=1)
    assert torch.allclose(solution.residual, true_residual, rtol=1e-2, atol=1e-7 if dtype == torch.float32 else 1e-15)
    assert len(solution.num_steps.unique()) > 1
    assert len(solution.history) >= int(solution.num_steps.max())


def test_bicgstab_of_a_system_alone_and_among_harder_ones():
    a, b = systems(torch.float64)
    a = a + torch.eye(24)
    together = linear_solve(product(a), b, BiCGStab(rtol=1e-8))
    for i in range(8):
        alone = linear_solve(product(a[i : i + 1]), b[i : i + 1], BiCGStab(rtol=1e-8))
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-6)
        assert abs(int(alone.num_steps[0]) - int(together.num_steps[i])) <= 1


def test_bicgstab_failures():
    """A skew operator has no progress along the residual; a singular one no solution; nan stays with its sample."""
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    failed = linear_solve(lambda x: x @ skew.T, torch.tensor([[1.0, 0.0]]).double(), BiCGStab(), on_failure="ignore")
    assert Status(int(failed.status)) in (Status.BREAKDOWN, Status.STAGNATED)
    d = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([[1.0, 1, 0], [0, 0, 1], [torch.nan, 0, 0]], dtype=torch.float64)
    solution = linear_solve(lambda x: d * x, b, BiCGStab(), on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.NONFINITE]
    assert torch.allclose(solution.value[0], torch.tensor([1, 0.5, 0], dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        linear_solve(product(systems(torch.float64)[0]), systems(torch.float64)[1], BiCGStab(max_steps=2))


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_series_is_its_sum(terms):
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64) / 8
    b = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    solution = linear_solve(
        lambda x: x - product(j)(x), b, NeumannSeries(terms=terms), history=True, on_failure="raise"
    )
    expected = sum(product(torch.linalg.matrix_power(j, i))(b) for i in range(terms))
    assert torch.allclose(solution.value, expected, rtol=1e-12)
    assert solution.num_evals == terms - 1
    assert (solution.status == Status.UNTESTED).all()
    last = product(torch.linalg.matrix_power(j, terms - 1))(b)
    assert torch.allclose(solution.residual, last.norm(dim=1) / b.norm(dim=1))


def test_neumann_series_tends_to_the_solution():
    j = 0.5 * torch.eye(4, dtype=torch.float64)
    b = torch.ones(2, 4, dtype=torch.float64)
    assert torch.allclose(linear_solve(lambda x: x - product(j)(x), b, NeumannSeries(terms=60)).value, 2 * b)


def test_refusals_of_bicgstab_and_neumann():
    with pytest.raises(ValueError, match=r"NeumannSeries\(terms=...\) must be a positive integer, got 0"):
        NeumannSeries(terms=0)
    with pytest.raises(ValueError, match="BiCGStab tolerances must be >= 0, got rtol=-1"):
        BiCGStab(rtol=-1)


def test_richardson_sums_the_series_where_it_is_fast():
    """The residual is that before the last term, every system stops by itself, and no product is wasted."""
    j = torch.tensor([0.01, 0.1, 0.4], dtype=torch.float64).view(3, 1, 1) * torch.eye(5)
    b = torch.ones(3, 5, dtype=torch.float64)
    solution = linear_solve(product(torch.eye(5) - j), b, Richardson(rtol=1e-7), on_failure="raise", history=True)
    assert solution.num_steps.tolist() == [4, 7, 18]
    assert solution.num_evals == 18
    assert solution.history.shape == (18, 3)
    for i, rate in enumerate((0.01, 0.1, 0.4)):
        n = int(solution.num_steps[i])
        assert solution.residual[i].item() == pytest.approx(rate**n, rel=1e-6)
        assert torch.allclose(solution.value[i], b[i] * sum(rate**k for k in range(n + 1)), rtol=1e-14)


def test_richardson_hands_on_what_is_slow():
    """Slow and expanding systems get the precision asked for, and the fast ones in the batch their own answer."""
    a, b = systems(torch.float64)
    fast, slow = 0.9 * torch.eye(24).expand(1, 24, 24), torch.stack((3.5 * torch.eye(24), -2 * torch.eye(24)))
    a, b = torch.cat((a, fast, slow)), torch.cat((b, b[:3]))
    solver = Richardson(rtol=1e-12, otherwise=GMRES(rtol=1.0))
    solution = linear_solve(product(a), b, solver, on_failure="raise")
    true_residual = (b - product(a)(solution.value)).norm(dim=1) / b.norm(dim=1)
    assert true_residual.max() < 1e-12
    for i in (0, 7, 8, 9):
        alone = linear_solve(product(a[i : i + 1]), b[i : i + 1], solver)
        assert torch.allclose(alone.value[0], solution.value[i], rtol=1e-10)
        assert alone.num_steps[0] == solution.num_steps[i]


@pytest.mark.parametrize("preconditioner", [None, lambda x: x * torch.tensor([1.0, -1.0, 2.0])])
def test_a_breakdown_of_cg_says_what_it_needs(preconditioner):
    a = torch.tensor([1.0, -1.0, 2.0] if preconditioner is None else [1.0, 1.0, 2.0])
    with pytest.raises(ConvergenceError, match='preconditioner, is not symmetric positive definite: use "gmres", "no'):
        linear_solve(lambda x: a * x, torch.ones(1, 3), CG(preconditioner=preconditioner), on_failure="raise")
    with pytest.raises(ConvergenceError) as caught:
        linear_solve(lambda x: 0 * x, torch.ones(1, 3), GMRES(), on_failure="raise")
    assert "definite" not in str(caught.value)


def test_richardson_statuses():
    d = torch.tensor([[1.0, 1.0], [0.0, 1.0], [torch.nan, 1.0], [0.6, 0.9]])
    b = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    solution = linear_solve(lambda x: d * x, b, Richardson(), on_failure="ignore")
    assert [Status(int(s)).name for s in solution.status] == ["CONVERGED", "BREAKDOWN", "NONFINITE", "CONVERGED"]
    assert solution.value[0].eq(0).all()
    assert solution.value[2].isnan().all()
    few = linear_solve(lambda x: d[3:] * x, b[3:], Richardson(max_steps=2), on_failure="ignore")
    assert few.status.item() == Status.MAX_STEPS
    assert few.residual.item() == pytest.approx((0.4**4 / 2 + 0.1**4 / 2) ** 0.5)
    assert linear_solve(lambda x: 2 * x, torch.zeros(0, 3), Richardson()).num_evals == 0
    # A residual of a few rounding errors is no failure. The terms of the series become smaller, which is not claimed.
    tight = linear_solve(lambda x: d[3:] * x, b[3:], Richardson(rtol=1e-9), on_failure="raise")
    assert tight.status.item() == Status.CONVERGED
    assert 1e-8 < tight.residual.item() < 1e-6
    with pytest.raises(ValueError, match="tolerances must be >= 0"):
        Richardson(rtol=-1)
    with pytest.raises(ValueError, match=r"max_rate=...\) must be in \[0, 1\), got 1"):
        Richardson(max_rate=1)
    with pytest.raises(TypeError, match="must be a linear solver, got 'gmres'"):
        Richardson(otherwise="gmres")
