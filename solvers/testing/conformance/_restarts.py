"""That samples can be taken back to an earlier iterate while the others go on."""

import math
import unittest

import torch
from torch import Tensor

from solvers.methods.solver import State
from solvers.problem.norms import rms_norm
from solvers.testing.conformance._base import INDEPENDENCE, ROUNDING, ConformanceTests, require
from solvers.testing.conformance._steps import tensors_of
from solvers.testing.row_contractions import RowContractions

OVERRIDE = (
    "Override Solver.restarted: for these samples, reset everything that your state holds besides z and fz, with "
    "torch.where or masked_fill rather than by a product with 0, which keeps a NaN."
)

# Samples that the tests restart, and the others.
RESTARTED, OTHERS = [1, 4], [0, 2, 3, 5]


class RestartTests(ConformanceTests):
    """``restarted`` moves the samples that it is told to, and no others."""

    def test_restarted_samples_are_at_the_given_points(self) -> None:
        """``z`` and ``fz`` are those given where samples restart and as before elsewhere; nobody's tensors change."""
        problem = RowContractions.make()
        for steps in range(1, 5):
            state = self._state_after(problem, steps)
            z, rows = problem.shift.flip(1), _rows()
            given = [(tensor, tensor.clone()) for tensor in (state.z, state.fz, z)]
            fz = problem(z)
            moved = self.solver.restarted(state, rows, z, fz)
            where = rows.unsqueeze(1)
            expected = torch.where(where, z, given[0][1]), torch.where(where, fz, given[1][1])
            require(
                type(moved) is type(state) and torch.equal(moved.z, expected[0]) and torch.equal(moved.fz, expected[1]),
                f"{self._yours} returns another z or fz from restarted than torch.where(rows, z, state.z) and "
                f"torch.where(rows, fz, state.fz), after {steps} steps.",
            )
            require(
                all(torch.equal(tensor, before) for tensor, before in given),
                f"{self._yours} writes into z or fz of the given state, or into the given z, in restarted. They belong "
                "to the caller and to f, so make new ones.",
            )

    def test_restarts_leave_the_other_samples_alone(self) -> None:
        """The other samples keep every bit of their state, and go on as if nothing had happened."""
        problem = RowContractions.make()
        others = torch.tensor(OTHERS)
        for steps in range(1, 5):
            undisturbed = self._state_after(problem, steps)
            state = self._state_after(problem, steps)
            before = {name: tensor.clone() for name, tensor in tensors_of(state, "state")}
            z = problem.shift.flip(1)
            state = self.solver.restarted(state, _rows(), z, problem(z))
            for name, tensor in tensors_of(state, "state"):
                require(
                    name not in before or _same(tensor[others], before[name][others]),
                    f"{self._yours} changes {name} in restarted for samples that do not restart. {INDEPENDENCE}",
                )
            for _ in range(6):
                state, undisturbed = self.solver.step(problem, state), self.solver.step(problem, undisturbed)
                require(
                    torch.allclose(state.z[others], undisturbed.z[others], rtol=ROUNDING, atol=ROUNDING),
                    f"{self._yours} goes on otherwise with the samples that did not restart, after {steps} steps and a "
                    f"restart of others. {INDEPENDENCE}",
                )

    def test_restarted_samples_are_solved(self) -> None:
        """A sample that is restarted far from where it was reaches its fixed point."""
        self._require_movable()
        problem = RowContractions.make()
        for steps in (1, 2, 3, 8):
            z = 10 * problem.shift.flip(1)
            state = self.solver.restarted(self._state_after(problem, steps), _rows(), z, problem(z))
            self._require_solved(problem, state, f"samples that restart after {steps} steps")

    def test_samples_recover_from_values_that_are_not_finite(self) -> None:
        """After a step whose image was NaN or infinite a restart at the iterate before it leads to the solution."""
        self._require_movable()
        problem = RowContractions.make()
        where = _rows().unsqueeze(1)

        def broken(z: Tensor) -> Tensor:
            return torch.where(where, bad, problem(z))

        for bad in (math.nan, math.inf):
            for steps in (1, 2, 3, 8):
                state = self._state_after(problem, steps)
                z, fz = state.z.clone(), state.fz.clone()
                with torch.no_grad():
                    state = self.solver.step(broken, state)
                    state = self.solver.restarted(state, _rows(), z, fz)
                what = f"samples whose image was {bad} in one step, after {steps} good ones and a restart"
                self._require_solved(problem, state, what)

    def test_gradients_flow_to_where_samples_restart(self) -> None:
        """The next iterates have a finite gradient to the points of the restart."""
        if not self.solver.differentiable:
            raise unittest.SkipTest(f"{self._yours} says differentiable = False.")
        problem = RowContractions.make()
        for steps in range(1, 5):
            z = problem.shift.flip(1).clone().requires_grad_()
            state = self._state_after(problem, steps)
            state = self.solver.restarted(state, _rows(), z, problem(z))
            for _ in range(3):
                state = self.solver.step(problem, state)
            total = state.fz.sum()
            if total.requires_grad:
                total.backward()
            gradient = z.grad
            require(
                gradient is not None
                and bool(gradient.isfinite().all())
                and bool(gradient[RESTARTED].any(dim=1).all())
                and not bool(gradient[OTHERS].any()),
                f"{self._yours} has no finite gradient to the points where samples restart, or one to points that are "
                f"not used, when they restart after {steps} steps.",
            )

    def _require_movable(self) -> None:
        if not self.movable:
            raise unittest.SkipTest("The test class says movable = False.")

    def _state_after(self, problem: RowContractions, steps: int) -> State:
        """The solver's state after ``init`` and further steps."""
        state = self.solver.init(problem, problem.start)
        for _ in range(steps - 1):
            state = self.solver.step(problem, state)
        return state

    def _require_solved(self, problem: RowContractions, state: State, what: str) -> None:
        """Take steps until the restarted samples have a small residual."""
        __tracebackhide__ = True
        with torch.no_grad():
            for _ in range(self.max_steps):
                error = rms_norm(state.fz - state.z)[RESTARTED]
                if bool((error <= 1e-6 * rms_norm(state.fz)[RESTARTED]).all()):
                    break
                state = self.solver.step(problem, state)
        found = torch.allclose(state.fz[RESTARTED], problem.solution()[RESTARTED], rtol=1e-4, atol=1e-4)
        require(found, f"{self._yours} does not solve {what}, within {self.max_steps} steps. {OVERRIDE}")


def _rows() -> Tensor:
    rows = torch.zeros(6, dtype=torch.bool)
    rows[RESTARTED] = True
    return rows


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal; a NaN equals a NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
