"""Samples that are taken back to another point while their batch mates go on."""

import dataclasses
import math

import pytest
import torch

from solvers import Anderson, Broyden, Picard, Squarem, State
from solvers.testing.row_contractions import RowContractions

# Whether the iterates after a restart are those of a new solve.
BEGIN_ANEW = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.7),
    **{f"anderson {m}": Anderson(memory=m) for m in (1, 2, 5, 10)},
    **{f"anderson {m} qr": Anderson(memory=m, least_squares="qr") for m in (1, 2, 5, 10)},
    "anderson damped": Anderson(damping=0.7),
    "anderson without safeguard": Anderson(memory=3, safeguard=False),
    "broyden": Broyden(),
    "broyden bad": Broyden(method="bad"),
    "broyden damped": Broyden(damping=0.7),
    "broyden line search": Broyden(line_search=True),
}
SOLVERS = {
    **BEGIN_ANEW,
    "broyden 3": Broyden(memory=3),
    "broyden bad 3": Broyden(method="bad", memory=3),
    **{f"squarem {scheme}": Squarem(scheme=scheme) for scheme in ("S1", "S2", "S3")},
}
ROWS = torch.tensor([False, True, False, False, True, False])
STEPS = (1, 2, 3, 4, 5, 9)


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


def after(solver, f, steps):
    """The state at the ``steps``-th iterate."""
    state = solver.init(f, f.start)
    for _ in range(steps - 1):
        state = solver.step(f, state)
    return state


def broken(f, value):
    """The map with this value in all entries of the samples ``ROWS``."""
    return lambda z: torch.where(ROWS.unsqueeze(1), value, f(z))


def iterates(solver, f, state, steps):
    """(steps, B, D) the next iterates."""
    found = []
    for _ in range(steps):
        state = solver.step(f, state)
        found.append(state.z)
    return torch.stack(found)


def plain_step(solver, z, fz):
    damping = getattr(solver, "damping", 1.0)
    return fz if damping == 1.0 else z.lerp(fz, damping)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_the_next_step_is_the_plain_one(solver, steps, bad):
    """Whatever the step before the restart left in the state: NaN, infinities, or squares that overflow."""
    f = RowContractions.make()
    z = 3 * f.shift.flip(1)
    with torch.no_grad():
        state = solver.step(broken(f, bad), after(solver, f, steps))
        state = solver.restarted(state, ROWS, z, f(z))
        following = solver.step(f, state)
    assert torch.allclose(following.z[ROWS], plain_step(solver, z, f(z))[ROWS], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", BEGIN_ANEW)
def test_restarted_samples_go_on_as_in_a_new_solve(name, steps):
    solver = BEGIN_ANEW[name]
    f = RowContractions.make()
    z = 3 * f.shift.flip(1)
    with torch.no_grad():
        state = solver.step(broken(f, math.nan), after(solver, f, steps))
        state = solver.restarted(state, ROWS, z, f(z))
        found = iterates(solver, f, state, 12)[:, ROWS]
        expected = iterates(solver, f, solver.init(f, z), 12)[:, ROWS]
    # Sums over the memory have another order, and near the solution the differences are made of rounding errors.
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_the_other_samples_keep_every_bit(solver):
    f = RowContractions.make()
    for steps in STEPS:
        with torch.no_grad():
            state, undisturbed = after(solver, f, steps), after(solver, f, steps)
            state = solver.step(broken(f, math.nan), state)
            undisturbed = solver.step(f, undisturbed)
            state = solver.restarted(state, ROWS, f.shift, f(f.shift))
            assert torch.equal(iterates(solver, f, state, 10)[:, ~ROWS], iterates(solver, f, undisturbed, 10)[:, ~ROWS])


def test_restarting_nobody_changes_nothing(solver):
    f = RowContractions.make()
    nobody = torch.zeros_like(ROWS)
    for steps in STEPS:
        with torch.no_grad():
            state = after(solver, f, steps)
            state = solver.restarted(state, nobody, torch.full_like(f.shift, math.nan), f.shift)
            assert torch.equal(iterates(solver, f, state, 6), iterates(solver, f, after(solver, f, steps), 6))


def blocks(state):
    """The large tensors that a state remembers."""
    inverse = getattr(state, "inverse", None)
    owners = ((state, "df"), (state, "dg"), (inverse, "u"), (inverse, "v"))
    return [getattr(owner, name) for owner, name in owners if hasattr(owner, name)]


@pytest.mark.parametrize("name", ["anderson 5", "anderson 5 qr", "broyden", "broyden bad 3"])
def test_memory_is_reused_only_where_no_gradient_is_recorded(name):
    solver, f = SOLVERS[name], RowContractions.make()
    with torch.no_grad():
        state = after(solver, f, 4)
        addresses = [block.data_ptr() for block in blocks(state)]
        moved = solver.restarted(state, ROWS, f.shift, f(f.shift))
        assert len(addresses) == 2
        assert [block.data_ptr() for block in blocks(moved)] == addresses
    recorded = dataclasses.replace(f, shift=f.shift.clone().requires_grad_())
    state = after(solver, recorded, 4)
    before = [block.detach().clone() for block in blocks(state)]
    solver.restarted(state, ROWS, f.shift, f(f.shift))
    assert all(torch.equal(block, old) for block, old in zip(blocks(state), before, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_gradients_through_a_restart(solver, steps):
    """They are those of the steps, and not NaN because of a NaN in what was forgotten."""
    problem = RowContractions.make(batch=6, size=12)
    points = problem.shift, problem.shift.flip(1)
    cotangent, directions = problem.shift.flip(0), (problem.shift.roll(1, 0), problem.shift.roll(2, 1))

    def loss(shift, z):
        f = dataclasses.replace(problem, shift=shift)
        state = solver.step(broken(f, math.nan), after(solver, f, steps))
        state = solver.restarted(state, ROWS, z, f(z))
        for _ in range(3):
            state = solver.step(f, state)
        return (state.fz * cotangent).sum()

    leaves = [point.clone().requires_grad_() for point in points]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for i, direction in enumerate(directions):
        ahead, behind = list(points), list(points)
        ahead[i], behind[i] = points[i] + 1e-6 * direction, points[i] - 1e-6 * direction
        with torch.no_grad():
            expected = (loss(*ahead) - loss(*behind)) / 2e-6
        assert torch.allclose((gradients[i] * direction).sum(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["anderson 5", "anderson 5 qr", "broyden", "broyden bad", "squarem S3"])
def test_a_map_with_a_bounded_domain_is_solved_by_taking_back(name):
    """``z - log(z) / 2`` from 9: extrapolation leads to negative z, where the map is NaN."""
    solver = SOLVERS[name]
    z0 = torch.tensor([[9.0], [2.0]], dtype=torch.float64)
    taken_back = 0

    def f(z):
        return z - torch.log(z) / 2

    state = solver.init(f, z0)
    best = state
    for _ in range(60):
        state = solver.step(f, state)
        lost = ~state.fz.isfinite().all(dim=1)
        taken_back += int(lost.sum())
        state = solver.restarted(state, lost, best.z, best.fz)
        closer = (state.displacement.abs() < best.displacement.abs()).all(dim=1)
        closer = closer.unsqueeze(1)
        best = State(z=torch.where(closer, state.z, best.z), fz=torch.where(closer, state.fz, best.fz))
    assert taken_back > 0
    assert torch.allclose(best.z, torch.ones(2, 1, dtype=torch.float64), rtol=1e-9)


def test_a_state_computes_its_displacement_unless_it_stores_it():
    z, fz = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(State(z, fz).displacement, fz)
    state = Anderson().init(torch.cos, z)
    assert state.displacement is state.g
    assert torch.equal(state.displacement, state.fz - state.z)
