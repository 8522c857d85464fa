"""Testing now and then, taking finished samples out of the batch, stepping by hand, and bounds of the error."""

import dataclasses
import itertools

import pytest
import torch

from solvers import Anderson, Broyden, Iteration, NewtonKrylov, Picard, Solver, State, Status, solve
from solvers.testing import BANK

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden(), "limited": Broyden(memory=5)}
all_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
TIGHT = {"rtol": 1e-8, "atol": 0, "max_steps": 3000, "on_failure": "raise"}


def easy_to_hard(batch=32, size=5):
    """The map c_i sin(z) + b_i, with c_i and b_i as arguments, and its arguments."""
    c = torch.linspace(0.05, 0.95, batch, dtype=torch.float64).unsqueeze(1)
    b = torch.randn(batch, size, dtype=torch.float64)
    return lambda z, c, b: c * torch.sin(z) + b, (c, b)


@all_solvers
def test_compact_gives_the_same_answers(solver):
    f, args = easy_to_hard()
    rows = []

    def counted(z, c, b):
        rows.append(len(z))
        return f(z, c, b)

    z0 = torch.zeros_like(args[1])
    whole = solve(f, z0, solver, args=args, history=True, **TIGHT)
    compact = solve(counted, z0, solver, args=args, history=True, compact=True, **TIGHT)
    assert rows[0] == 32
    assert rows[-1] <= 8
    assert all(a >= b for a, b in itertools.pairwise(rows))
    assert torch.equal(compact.num_steps, whole.num_steps)
    assert torch.allclose(compact.value, whole.value, rtol=1e-10)
    assert torch.allclose(compact.history, whole.history, rtol=1e-4, atol=1e-12)
    assert compact.num_evals == whole.num_evals == len(rows)


def test_compact_with_failures_and_pytrees():
    rate = torch.tensor([[0.1], [3.0], [0.9], [0.2], [torch.nan], [0.95]], dtype=torch.float64)
    z0 = {"a": torch.zeros(6, 2, dtype=torch.float64), "b": torch.zeros(6, dtype=torch.float64)}

    def f(z, inputs, shift):
        return {"a": inputs["rate"] * z["a"] + shift, "b": inputs["rate"].squeeze(1) * z["b"] + 1}

    options = {"rtol": 1e-6, "atol": 0, "max_steps": 200, "on_failure": "ignore"}
    args = ({"rate": rate, "note": "constant"}, torch.ones(2, dtype=torch.float64))
    whole = solve(f, z0, Picard(), args=args, **options)
    compact = solve(f, z0, Picard(), args=args, compact=True, in_dims=(0, None), **options)
    assert torch.equal(compact.status, whole.status)
    assert {Status.CONVERGED, Status.DIVERGED, Status.NONFINITE} <= {Status(int(s)) for s in whole.status.unique()}
    for name in ("a", "b"):
        assert torch.equal(compact.value[name], whole.value[name]) or compact.value[name][4].isnan().all()
    assert torch.equal(compact.num_steps, whole.num_steps)


def test_compact_takes_the_named_dimension():
    c = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    solution = solve(
        lambda z, c: c.T * z + 1,
        torch.zeros(8, 1, dtype=torch.float64),
        Picard(),
        args=(c.unsqueeze(0),),
        compact=True,
        in_dims=(1,),
        **TIGHT,
    )
    assert torch.allclose(solution.value.squeeze(1), 1 / (1 - c), rtol=1e-6)


def test_compact_lets_gradients_through():
    f, (c, b) = easy_to_hard(batch=6)
    b.requires_grad_()
    for solver in (Picard(), Anderson()):
        value = solve(
            f, torch.zeros_like(b), solver, args=(c, b), compact=True, rtol=1e-13, atol=0, max_steps=1000
        ).value
        (gradient,) = torch.autograd.grad(value.sum(), b)
        assert torch.allclose(gradient, 1 / (1 - c * torch.cos(value)), rtol=1e-5)


def test_compact_refusals():
    f, (c, b) = easy_to_hard()
    z0 = torch.zeros_like(b)
    with pytest.raises(ValueError, match="compact=True needs batch_dims=1.*got 2"):
        solve(f, z0, args=(c, b), compact=True, batch_dims=2)
    with pytest.raises(ValueError, match=r"dimension 0 of argument 1 for the 32 samples, but its shape is \(5,\)"):
        solve(f, z0, args=(c, b[0]), compact=True)
    with pytest.raises(ValueError, match="one entry for each of the 2 args, got \\(0,\\)"):
        solve(f, z0, args=(c, b), compact=True, in_dims=(0,))


@all_solvers
@pytest.mark.parametrize("every", [2, 5])
def test_check_every(solver, every):
    f, args = easy_to_hard()
    z0 = torch.zeros_like(args[1])
    often = solve(f, z0, solver, args=args, **TIGHT)
    rarely = solve(f, z0, solver, args=args, check_every=every, history=True, **TIGHT)
    assert torch.allclose(rarely.value, often.value, rtol=1e-5)
    assert ((rarely.num_steps - often.num_steps) < every).all()
    assert ((rarely.num_steps % every == 0) | (rarely.num_steps == 1)).all()
    assert len(rarely.history) == 1 + int(rarely.num_steps.max()) // every


def test_check_every_tests_the_last_step():
    f, args = easy_to_hard()
    solution = solve(
        f, torch.zeros_like(args[1]), Picard(), args=args, check_every=10, max_steps=7, on_failure="ignore"
    )
    assert solution.num_steps.unique().tolist() == [7]
    assert solution.converged.any()
    with pytest.raises(ValueError, match=r"Stopping\(check_every=...\) must be a positive integer, got 0"):
        solve(f, torch.zeros_like(args[1]), args=args, check_every=0)


@pytest.mark.parametrize("solver", [*SOLVERS.values(), NewtonKrylov()], ids=str)
def test_stepping_by_hand_is_solving(solver):
    bank = BANK["tanh"](torch.float64)
    iteration = Iteration(bank.f, bank.z0, solver, rtol=1e-8, atol=0)
    steps = 1
    assert iteration.num_steps == 1
    while not iteration.done:
        before = iteration.solution()
        assert not before.converged.all()
        iteration.step()
        steps += 1
        assert iteration.num_steps == steps
        assert iteration.state.z.shape == bank.z0.shape
    by_hand, solved = iteration.solution(), solve(bank.f, bank.z0, solver, rtol=1e-8, atol=0)
    assert torch.equal(by_hand.value, solved.value)
    assert torch.equal(by_hand.num_steps, solved.num_steps)
    assert by_hand.num_evals == solved.num_evals
    iteration.step()
    assert iteration.num_steps == steps


def test_a_look_in_between_changes_nothing():
    iteration = Iteration(torch.cos, torch.ones(2, 1), Picard(), rtol=1e-6)
    early = iteration.solution()
    assert (early.status == Status.MAX_STEPS).all()
    assert (early.num_steps == 1).all()
    while not iteration.done:
        iteration.step()
    assert iteration.solution().converged.all()
    assert (early.status == Status.MAX_STEPS).all()


@all_solvers
@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_error_bound_holds(solver, rtol):
    f, args = easy_to_hard()
    z0 = torch.zeros_like(args[1])
    exact = solve(f, z0, Anderson(), args=args, rtol=1e-14, atol=1e-14, max_steps=2000, on_failure="ignore").value
    solution = solve(f, z0, solver, args=args, rtol=rtol, atol=0, max_steps=2000)
    error = (solution.value - exact).square().mean(dim=1).sqrt()
    bound = solution.error_bound(args[0].squeeze(1))  # |sin'| <= 1, so that c_i is the factor of sample i
    assert (error <= bound + 1e-12).all()
    assert (bound < 1e4 * rtol).all()


@pytest.mark.parametrize("rate", [0.9, 0.985, 0.999])
def test_error_bound_is_sharp_for_values_that_are_images_and_those_that_are_not(rate):
    z0 = torch.zeros(1, 1, dtype=torch.float64)
    solution = solve(lambda z: rate * z + 1, z0, Picard(), rtol=1e-3, max_steps=9999)
    assert solution.is_image.tolist() == [rate < 0.98]
    error = (solution.value - 1 / (1 - rate)).abs().item()
    assert error == pytest.approx(solution.error_bound(rate).item(), rel=1e-10)


def test_error_bound_needs_a_contraction_and_a_residual():
    solution = solve(torch.cos, torch.ones(2, 1), Picard(), rtol=1e-3)
    assert torch.allclose(solution.change, (solution.value * solution.residual.unsqueeze(1)).squeeze(1))
    with pytest.raises(ValueError, match=r"contraction factor in \[0, 1\), got 1.0"):
        solution.error_bound(1.0)
    assert solution.error_bound(1 - 1e-9).isfinite().all()  # which is 1 in float32
    fixed = solve(torch.cos, torch.ones(2, 1), Picard(), rtol=None, atol=None, max_steps=3)
    with pytest.raises(ValueError, match="has no residual"):
        fixed.error_bound(0.9)
    watched = solve(torch.cos, torch.ones(2, 1), Picard(), rtol=None, atol=None, max_steps=3, history=True)
    assert watched.error_bound(0.9).shape == (2,)


@pytest.mark.parametrize("options", [{"rtol": 1e-10, "atol": 0}, {"rtol": None, "atol": None}], ids=["test", "no test"])
@pytest.mark.parametrize("solver", [*SOLVERS.values(), "auto", "squarem", "newton_krylov"], ids=str)
def test_a_copy_and_its_original_go_on_by_themselves(solver, options):
    f, args = easy_to_hard(batch=4)
    options = {"args": args, "max_steps": 30, "history": True, **options}

    def steps(iteration, number):
        for _ in range(number):
            iteration.step()
        return iteration.solution()

    z0 = torch.zeros_like(args[1])
    for taken in (0, 3, 12):
        iteration = Iteration(f, z0, solver, **options)
        steps(iteration, taken)
        copy = iteration.with_tensors(lambda tensor: tensor)
        before = steps(copy, 0)
        value, history = before.value.clone(), before.history.clone()
        after = steps(iteration, 8)
        assert torch.equal(steps(copy, 0).value, value)
        assert torch.equal(steps(copy, 0).history, history)
        again = steps(copy, 8)
        assert torch.equal(again.value, after.value)
        assert torch.equal(again.history, after.history)
        assert torch.equal(steps(Iteration(f, z0, solver, **options), taken + 8).value, after.value)


class ReflectedState(State):
    """Of steps that contract where the map expands."""

    @property
    def image_is_nearer(self):
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflected(Solver):
    """z <- (z + f(z)) / 2, which contracts for f(z) = x - 3 z / 2."""

    def init(self, f, z0):
        return ReflectedState(z0, f(z0))

    def step(self, f, state):
        z = state.z.lerp(state.fz, 0.5)
        return ReflectedState(z, f(z))


def test_a_state_can_say_that_the_image_is_not_nearer(double):
    """Then the value is the iterate, whose residual meets the tolerance, in every sample and also where f contracts."""
    rate = torch.tensor([[-1.5], [0.5], [-2.0]])

    def f(z):
        return rate * z + 1

    for rtol in (1e-2, 1e-6):
        solution = solve(f, torch.zeros(3, 4), Reflected(), rtol=rtol, atol=0, on_failure="raise")
        change = f(solution.value) - solution.value
        assert torch.allclose(change.square().mean(dim=1).sqrt(), solution.change)
        assert torch.allclose(
            solution.error_estimate, (solution.value - 1 / (1 - rate)).square().mean(dim=1).sqrt(), rtol=1e-3
        )
