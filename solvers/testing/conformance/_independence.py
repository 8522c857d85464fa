"""Tests that samples do not affect each other."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from solvers._solution import Solution, Status
from solvers._solve import solve
from solvers.testing.conformance._base import RTOL, ConformanceTests, require
from solvers.testing.row_contractions import RowContractions


class IndependenceTests(ConformanceTests):
    """The status, number of steps and answer of a sample are the same in any batch."""

    def test_a_sample_alone_is_as_in_the_batch(self) -> None:
        """Each sample by itself takes the same number of steps to the same answer, up to rounding."""
        problem = RowContractions.make()
        together = self._solve(problem, problem.start)
        for i in range(6):
            row = torch.tensor([i])
            alone = self._solve(problem.select(row), problem.start[row])
            self._require_same(alone, _select(together, row), f"for sample {i} of a batch of 6 by itself")

    def test_order_of_the_samples_does_not_matter(self) -> None:
        """Permuting the batch permutes the answers."""
        problem = RowContractions.make()
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        solution = self._solve(problem, problem.start)
        permuted = self._solve(problem.select(order), problem.start)
        self._require_same(permuted, _select(solution, order), "when the batch is permuted")

    def test_finished_samples_can_leave_the_batch(self) -> None:
        """With ``compact=True``, which takes finished samples out of the state, the solution stays the same."""
        problem = RowContractions.make()

        def f(z: Tensor, *maps: Tensor) -> Tensor:
            return RowContractions(*maps)(z)

        maps = (problem.rate, problem.growth, problem.shift)
        compact = self._solve(f, problem.start, args=maps, compact=True)
        self._require_same(compact, self._solve(problem, problem.start), "with compact=True")

    def test_bad_samples_leave_the_others_alone(self) -> None:
        """A sample that is NaN, overflows, diverges or is solved at once changes nothing for the others."""
        problem = RowContractions.make()
        others = torch.tensor([0, 1, 3, 4, 5])
        reference = _select(self._solve(problem, problem.start), others)
        for what, bad in (
            ("beside a sample that is NaN", problem.replace(2, shift=math.nan)),
            ("beside a sample that overflows", problem.replace(2, growth=1e100)),
            ("beside a sample that diverges under Picard iteration", problem.replace(2, growth=5.0)),
            ("beside a sample that is solved at the start", problem.replace(2, shift=0.0)),
        ):
            solution = solve(
                bad, bad.start, self.solver, rtol=RTOL, atol=0, max_steps=self.max_steps, on_failure="ignore"
            )
            self._require_same(_select(solution, others), reference, f"for the others {what}")
            if what.endswith("is NaN"):
                status = Status(int(solution.status[2]))
                require(
                    status is Status.NONFINITE and bool(solution.value[2].isnan().all()),
                    f"{self._yours} hides a map that is NaN everywhere: its status is {status.name}. Do not replace "
                    "NaN by numbers.",
                )


def _select(solution: Solution[Any], rows: Tensor) -> Solution[Any]:
    """Return the solution of only these samples."""
    return dataclasses.replace(
        solution,
        value=solution.value[rows],
        status=solution.status[rows],
        residual=None if solution.residual is None else solution.residual[rows],
        num_steps=solution.num_steps[rows],
        history=None if solution.history is None else solution.history[:, rows],
    )
