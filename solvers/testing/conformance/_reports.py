"""Tests that a solution tells the truth about the solve."""

import warnings

import torch

from solvers._solution import ConvergenceError, ConvergenceWarning, Status
from solvers._solve import solve
from solvers.problem.norms import relative, rms_norm
from solvers.testing.conformance._base import RTOL, ConformanceTests, require
from solvers.testing.row_contractions import RowContractions


class ReportTests(ConformanceTests):
    """Statuses, residuals and histories are those of the iterates, and failures are reported as requested."""

    def test_converged_means_a_small_residual(self) -> None:
        """The residual of every converged sample, computed again from the map, is within the tolerance."""
        problem = RowContractions.make()
        for rtol in (1e-3, RTOL):
            solution = self._solve(problem, problem.start, rtol=rtol)
            # The value is the image of the iterate that was judged, and the map contracts by `rate` in this norm; or it
            # is the iterate, for a solver whose states say so.
            error = rms_norm(problem(solution.value) - solution.value)
            assert solution.is_image is not None
            rate = torch.where(solution.is_image, problem.rate.squeeze(1) * (1 + 1e-6), 1 + 2 * rtol)
            bound = rate * rtol * rms_norm(solution.value)
            require(
                (error <= bound).all(),
                f"{self._yours} ends CONVERGED at rtol={rtol:.0e}, but the values have residuals of up to "
                f"{float(relative(error, rms_norm(solution.value)).max()):.1e}. Check that fz in its states is the "
                "result of calling f with z.",
            )

    def test_too_few_steps_are_reported(self) -> None:
        """A sample that does not meet the tolerance within ``max_steps`` has the status MAX_STEPS."""
        problem = RowContractions.make()
        solution = solve(problem, problem.start, self.solver, rtol=0, atol=0, max_steps=3, on_failure="ignore")
        require(
            (solution.status == Status.MAX_STEPS).all() and (solution.num_steps == 3).all(),
            f"{self._yours} ends with the statuses {solution.status.tolist()} after {solution.num_steps.tolist()} "
            "steps, where MAX_STEPS after max_steps=3 steps is expected.",
        )

    def test_history_is_the_residual_of_every_step(self) -> None:
        """The history holds the relative residuals of the iterates; the value is the best of them, or its image."""
        problem = RowContractions.make()
        solution = self._solve(problem, problem.start, rtol=1e-4, history=True)
        history, residual = solution.history, solution.residual
        assert history is not None
        assert residual is not None
        assert solution.is_image is not None
        steps = int(solution.num_steps.max())
        require(
            history.shape == (steps, 6),
            f"{self._yours} has a history of shape {tuple(history.shape)} after {steps} steps on 6 samples.",
        )
        iterates = self._iterates(problem, problem.start, steps)
        replayed = torch.stack([relative(rms_norm(fz - z), rms_norm(fz)) for z, fz in iterates])  # (steps, 6)
        for sample, taken in enumerate(solution.num_steps.tolist()):
            require(
                torch.allclose(history[:taken, sample], replayed[:taken, sample], rtol=1e-6, atol=0),
                f"{self._yours} has the history {history[:taken, sample].tolist()}, but the residuals are "
                f"{replayed[:taken, sample].tolist()} when its init and step are called directly.",
            )
            best = int(history[:taken, sample].argmin())
            is_image = int(solution.is_image[sample])
            expected, what = iterates[best][is_image][sample], ("its best iterate", "the image of its best iterate")
            require(
                bool(residual[sample] == history[best, sample])
                and torch.allclose(solution.value[sample], expected, rtol=1e-6, atol=1e-9),
                f"{self._yours} does not return {what[is_image]}, which is that of step {best + 1} of {taken}.",
            )

    def test_failures_are_reported_as_asked(self) -> None:
        """``on_failure`` gives a warning, an error that holds the solution, or nothing."""
        problem = RowContractions.make()
        modes = {"warn": ConvergenceWarning, "raise": ConvergenceError, "ignore": None}
        for mode, expected in modes.items():
            got: type | None = None
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                try:
                    solve(problem, problem.start, self.solver, rtol=0, atol=0, max_steps=2, on_failure=mode)  # type: ignore[arg-type]
                except (ConvergenceWarning, ConvergenceError) as failure:
                    got = type(failure)
            require(
                got is expected,
                f"{self._yours} fails with {got} under on_failure={mode!r}, where {expected} is expected.",
            )
