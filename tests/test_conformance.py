"""Our solvers keep the contract, and the suite that says so notices those that do not."""

import dataclasses
import unittest
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from solver_rows import CALLS_VARY, SOLVERS

from solvers import Anderson, Broyden, Picard, Solver, Squarem, State
from solvers.testing import SolverConformance

ROWS: dict[str, Solver] = {
    **SOLVERS,
    "anderson 5 without safeguard": Anderson(safeguard=False),
    "broyden 5": Broyden(memory=5),
    "broyden bad 5": Broyden(method="bad", memory=5),
    "squarem S1": Squarem(scheme="S1"),
    "squarem S2": Squarem(scheme="S2"),
}


class TestOurSolvers(SolverConformance):
    @pytest.fixture(autouse=True, params=ROWS)
    def _row(self, request):
        self.solver = ROWS[request.param]
        if request.param in CALLS_VARY:
            self.calls_per_step = None


# Solvers that break the contract, each in one way.


def breaks(test, message):
    """A class decorator: a frozen solver, and the test of the suite that must fail with this message."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        BROKEN.append(pytest.param(cls(), test, message, id=cls.__name__))
        return cls

    return register


BROKEN = []


class Iteration(Solver):
    """Picard iteration, whose parts the broken solvers replace."""

    def init(self, f, z0):
        return State(z0, f(z0))

    def step(self, f, state):
        return State(state.fz, f(state.fz))


@breaks("test_a_sample_alone_is_as_in_the_batch", "for sample 0 of a batch of 6 by itself.*dim=1")
class StepLengthOfTheBatch(Iteration):
    def step(self, f, state):
        g = state.fz - state.z
        z = state.z + 1 / (1 + g.abs().max()) * g
        return State(z, f(z))


@breaks("test_bad_samples_leave_the_others_alone", "for the others beside a sample that is NaN")
class RestOfTheBatch(Iteration):
    def step(self, f, state):
        z = state.fz + 0 * state.fz.sum()
        return State(z, f(z))


@breaks("test_restarted_samples_are_at_the_given_points", "another z or fz from restarted")
class RestartsNothing(Iteration):
    def restarted(self, state, rows, z, fz):
        return state


@breaks("test_restarted_samples_are_at_the_given_points", "writes into z or fz of the given state.*in restarted")
class RestartsInPlace(Iteration):
    def restarted(self, state, rows, z, fz):
        state.z[rows], state.fz[rows] = z[rows], fz[rows]
        return state


@dataclasses.dataclass
class Mean(State):
    """The mean of the last images, with decaying weights."""

    mean: torch.Tensor


class Averages(Iteration):
    def init(self, f, z0):
        fz = f(z0)
        return Mean(z0, fz, fz)

    def step(self, f, state):
        z = 0.9 * state.fz + 0.1 * state.mean
        fz = f(z)
        return Mean(z, fz, 0.5 * (fz + state.mean))


@breaks("test_samples_recover_from_values_that_are_not_finite", "whose image was nan.*Override Solver.restarted")
class RemembersNan(Averages):
    pass


@breaks("test_restarts_leave_the_other_samples_alone", "changes state.mean in restarted for samples that do not")
class RestartsAll(Averages):
    def restarted(self, state, rows, z, fz):
        return dataclasses.replace(super().restarted(state, rows, z, fz), mean=fz)


@breaks("test_gradients_flow_to_where_samples_restart", "has no finite gradient to the points where samples restart")
class RestartsWithoutGradients(Iteration):
    def restarted(self, state, rows, z, fz):
        return super().restarted(state, rows, z.detach(), fz.detach())


@breaks("test_order_of_the_samples_does_not_matter", "when the batch is permuted")
class FirstSampleIsSpecial(Iteration):
    def step(self, f, state):
        z = torch.cat((state.z[:1].lerp(state.fz[:1], 0.5), state.fz[1:]))
        return State(z, f(z))


@breaks("test_nothing_is_kept_on_the_solver", "when a second solve runs in between")
class KeepsOnTheClass(Iteration):
    steps: ClassVar[dict[str, int]] = {}

    def init(self, f, z0):
        self.steps["taken"] = 1
        return State(z0, f(z0))

    def step(self, f, state):
        self.steps["taken"] += 1
        z = state.z.lerp(state.fz, 1 / self.steps["taken"] ** 0.1)
        return State(z, f(z))


@breaks("test_a_solve_can_be_repeated", "the second time")
class DrawsAtRandom(Iteration):
    def step(self, f, state):
        z = state.z.lerp(state.fz, 0.5 + 0.5 * float(torch.rand(())))
        return State(z, f(z))


@breaks("test_step_keeps_iterate_and_image_together", "fz is not f\\(z\\)")
class ImageIsDamped(Iteration):
    def step(self, f, state):
        return State(state.fz, state.fz.lerp(f(state.fz), 0.5))


@breaks("test_converged_means_a_small_residual", "(ends CONVERGED at rtol=1e-03, but|UNSETTLED)")
class FlattersItself(Iteration):
    def step(self, f, state):
        return State(state.fz, state.fz.lerp(f(state.fz), 0.01))


@breaks("test_step_keeps_iterate_and_image_together", "writes into the z or fz of the given state")
class ReusesTheImage(Iteration):
    def step(self, f, state):
        z = state.fz.clone()
        state.fz.copy_(f(z))
        return State(z, state.fz)


@breaks("test_inputs_are_not_changed", "writes into z0")
class WritesIntoTheStart(Iteration):
    def step(self, f, state):
        z = state.z.copy_(state.fz)
        return State(z, f(z))


@breaks("test_inputs_are_not_changed", "writes into the tensor that f returned")
class WritesIntoTheImage(Iteration):
    def step(self, f, state):
        z = state.fz.add_(state.z).mul_(0.5)
        return State(z, f(z))


@breaks("test_fixed_steps_are_exact", "makes 3 calls of f in 2 fixed steps, where 2 are expected.*set calls_per_step")
class CallsTwice(Iteration):
    def step(self, f, state):
        z = f(state.fz)
        return State(z, f(z))


@breaks("test_init_evaluates_the_map_once", "calls f 2 times in init")
class InitCallsTwice(Iteration):
    def init(self, f, z0):
        f(z0)
        return State(z0, f(z0))


@breaks("test_init_evaluates_the_map_once", "does not begin at z0")
class InitTakesAStep(Iteration):
    def init(self, f, z0):
        return State(z0 + 1, f(z0 + 1))


@breaks("test_init_evaluates_the_map_once", "returns a tuple from init")
class StateIsATuple(Iteration):
    def init(self, f, z0):
        return z0, f(z0)


@breaks("test_step_keeps_iterate_and_image_together", "whose z is not like the start.*torch.float64")
class WorksInFloat32(Iteration):
    def step(self, f, state):
        return State(state.fz.float(), f(state.fz.float()))


@dataclasses.dataclass
class OneStepLength(State):
    damping: torch.Tensor


@breaks("test_init_evaluates_the_map_once", r"with state.damping of shape \(1,\)")
class KeepsWhatHasNoSamples(Iteration):
    def init(self, f, z0):
        return OneStepLength(z0, f(z0), torch.ones(1))


@dataclasses.dataclass
class Past(State):
    images: list[torch.Tensor]


@breaks("test_init_evaluates_the_map_once", "state.images holds tensors in a list.*stack them")
class KeepsAList(Iteration):
    def init(self, f, z0):
        return Past(z0, f(z0), [z0])


@breaks("test_bad_samples_leave_the_others_alone", "hides a map that is NaN everywhere")
class HidesNan(Iteration):
    def init(self, f, z0):
        return State(z0, f(z0).nan_to_num())

    def step(self, f, state):
        return State(state.fz, f(state.fz).nan_to_num())


@breaks("test_steps_past_convergence_stay_finite", "does not stay at the solution 2.0.*torch.where")
class DividesByZero(Iteration):
    def step(self, f, state):
        g = state.fz - state.z
        z = state.z + g * (g * g).sum(1, keepdim=True) / (g * g).sum(1, keepdim=True)
        return State(z, f(z))


@breaks("test_solves_the_bank_in_float64", "does not solve the problem 'linear 0.5' of the bank in torch.float64")
class RoundsToFloat32(Iteration):
    def step(self, f, state):
        z = state.fz.float().to(state.fz.dtype)
        return State(z, f(z))


@breaks("test_solves_half_precision_states", "does not solve what this test begins with")
class Crawls(Iteration):
    def step(self, f, state):
        z = state.z.lerp(state.fz, 0.001)
        return State(z, f(z))


@breaks("test_small_and_empty_batches", "does not solve what this test begins with")
class DividesBySizeMinusOne(Iteration):
    def step(self, f, state):
        g = state.fz - state.z
        z = state.z + g / (1 + g.square().sum(1, keepdim=True) / (g.shape[1] - 1))
        return State(z, f(z))


@breaks("test_gradients_through_fixed_steps", "cuts the gradient to the start")
class Detaches(Iteration):
    def init(self, f, z0):
        return State(z0.detach(), f(z0.detach()))


@breaks("test_gradients_belong_to_their_sample", "cuts the gradient to a tensor of the map.*ClassVar")
class HasNoGradients(Iteration):
    @torch.no_grad()
    def init(self, f, z0):
        return super().init(f, z0)

    @torch.no_grad()
    def step(self, f, state):
        return super().step(f, state)


@breaks("test_gradients_through_fixed_steps", "by backpropagation through 4 steps, and .* by finite differences")
class DetachesItsStepLength(Iteration):
    def step(self, f, state):
        g = state.fz - state.z
        z = state.z + g / (1 + g.detach().square().mean(1, keepdim=True))
        return State(z, f(z))


@breaks("test_gradients_belong_to_their_sample", "depend on the inputs of another")
class LeaksGradients(Iteration):
    def step(self, f, state):
        mean = state.fz.mean(0, keepdim=True)
        z = state.fz + (mean - mean.detach())
        return State(z, f(z))


@breaks("test_gradients_are_finite_past_convergence", "nan.* instead of .*square roots at zero")
class RootsAtZero(Iteration):
    def step(self, f, state):
        size = (state.fz - state.z).square().sum(1, keepdim=True).sqrt()
        z = state.fz + torch.where(size > 0, 0.0, size)
        return State(z, f(z))


@breaks("test_hyperparameters_are_a_frozen_value", "is not hashable.*tuples")
class HasAList(Iteration):
    weights: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


@breaks("test_can_be_copied_and_pickled", "cannot be pickled")
class HasALambda(Iteration):
    schedule: Callable[[int], float] = lambda step: 1 / step


@breaks("test_can_be_copied_and_pickled", "comes back from copy.deepcopy as .*which is not equal to it")
class HasAnIdentity(Iteration):
    key: object = dataclasses.field(default_factory=object)


class Bare(Picard):
    pass


@dataclasses.dataclass
class Thawed(Iteration):
    damping: float = 1.0


@dataclasses.dataclass(frozen=True)
class Positional(Iteration):
    damping: float = 1.0


BROKEN += [
    pytest.param(Thawed(), "test_hyperparameters_are_a_frozen_value", "not a frozen one.*frozen=True", id="Thawed"),
    pytest.param(
        Positional(), "test_hyperparameters_are_a_frozen_value", r"positional.*\['damping'\]", id="Positional"
    ),
    pytest.param(Bare(), "test_hyperparameters_are_a_frozen_value", "not itself a dataclass", id="Bare"),
    pytest.param(Picard, "test_hyperparameters_are_a_frozen_value", "Set `solver = YourSolver", id="a class"),
]


def conformance(solver, **attributes):
    return type("Conformance", (SolverConformance,), {"solver": solver, **attributes})()


@pytest.mark.parametrize(("solver", "test", "message"), BROKEN)
def test_broken_solver_is_noticed(solver, test, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        getattr(conformance(solver), test)()


def test_solver_without_a_decorator_is_refused():
    with pytest.raises(TypeError, match=r"Iteration is not a dataclass. Put @dataclasses.dataclass\(frozen=True"):
        Iteration()


def test_attributes_of_the_suite():
    CallsTwiceSuite = conformance(CallsTwice(), calls_per_step=2)  # noqa: N806
    CallsTwiceSuite.test_fixed_steps_are_exact()
    CallsTwiceSuite.test_step_keeps_iterate_and_image_together()
    conformance(CallsTwice(), calls_per_step=None).test_fixed_steps_are_exact()
    with pytest.raises(unittest.SkipTest, match="says movable = False"):
        conformance(RemembersNan(), movable=False).test_samples_recover_from_values_that_are_not_finite()
    with pytest.raises(unittest.SkipTest, match="says differentiable = False"):
        conformance(SOLVERS["newton_krylov"]).test_gradients_through_fixed_steps()
    with pytest.raises(AssertionError, match="names 'cosine', which is not in the bank: linear 0.5"):
        conformance(Picard(), problems=("cosine",)).test_solves_the_bank_in_float32()
    with pytest.raises(AssertionError, match="'linear 0.9'.*within max_steps=20"):
        conformance(Picard(), max_steps=20, problems=("linear 0.9",)).test_solves_the_bank_in_float32()
