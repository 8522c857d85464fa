"""Tests that a solver finds fixed points for every kind of state."""

from typing import Any

import torch
from torch import Tensor

from solvers._solve import solve
from solvers.problem.norms import rms_norm
from solvers.testing.conformance._base import ConformanceTests, Counted, require
from solvers.testing.problems import BANK
from solvers.testing.row_contractions import RowContractions


class AnswerTests(ConformanceTests):
    """The solver finds the right answer for all dtypes, shapes, layouts and structures of the state."""

    def test_solves_the_bank_in_float32(self) -> None:
        """The solver finds the known fixed points to 1e-5."""
        self._require_bank_is_solved(torch.float32, 1e-5)

    def test_solves_the_bank_in_float64(self) -> None:
        """The solver finds the known fixed points to 1e-10."""
        self._require_bank_is_solved(torch.float64, 1e-10)

    def _require_bank_is_solved(self, dtype: torch.dtype, rtol: float) -> None:
        __tracebackhide__ = True
        for name in self.problems:
            require(name in BANK, f"`problems` names {name!r}, which is not in the bank: {', '.join(BANK)}.")
            problem = BANK[name](dtype)
            solution = solve(
                problem.f, problem.z0, self.solver, rtol=rtol, atol=0, max_steps=self.max_steps, on_failure="ignore"
            )
            require(
                solution.converged.all(),
                f"{self._yours} does not solve the problem {name!r} of the bank in {dtype} to rtol={rtol:.0e} within "
                f"max_steps={self.max_steps}. If it is not meant for such problems, name others in `problems` of the "
                f"test class.\n{solution.summary()}",
            )
            # If a map contracts by 0.9, the error is up to 9 times the residual.
            error = rms_norm(solution.value - problem.solution) / rms_norm(problem.solution)
            require(
                (error <= 20 * rtol).all(),
                f"{self._yours} reports a relative residual of at most {float(solution.residual.max()):.1e} on "  # type: ignore[union-attr]
                f"{name!r} in {dtype}, but is off the fixed point by {float(error.max()):.1e}.",
            )

    def test_solves_half_precision_states(self) -> None:
        """A bfloat16 or float16 state, which the map rounds in each call, is solved to the precision of its dtype."""
        problem = RowContractions.make(dtype=torch.float32, slowest=0.5)
        for dtype in (torch.bfloat16, torch.float16):
            eps = torch.finfo(dtype).eps

            def f(z: Tensor, dtype: torch.dtype = dtype) -> Tensor:
                return problem(z.float()).to(dtype)

            solution = self._solve(f, problem.start.to(dtype), rtol=4 * eps)
            error = rms_norm(solution.value.float() - problem.solution()) / rms_norm(problem.solution())
            require(
                solution.value.dtype == dtype and bool((error < 10 * eps).all()),
                f"{self._yours} is off by {float(error.max()):.1e} in {dtype}, whose eps is {eps:.1e}.",
            )

    def test_exact_start_stops_at_once(self) -> None:
        """A start whose residual is zero is returned after one call of the map."""
        z0 = RowContractions.make().shift
        solution = self._solve(lambda z: z, z0)
        require(
            solution.num_evals == 1 and torch.equal(solution.value, z0),
            f"{self._yours} does not stop at a start that is a fixed point: it makes {solution.num_evals} calls of f.",
        )

    def test_fixed_steps_are_exact(self) -> None:
        """With ``rtol=None, atol=None``, a solve takes ``max_steps`` steps and returns the last image."""
        problem = RowContractions.make()
        for steps in (1, 2, 7):
            f = Counted(problem)
            solution = solve(f, problem.start, self.solver, rtol=None, atol=None, max_steps=steps)
            expected = None if self.calls_per_step is None else 1 + (steps - 1) * self.calls_per_step
            require(
                solution.num_evals == f.calls and expected in (None, f.calls),
                f"{self._yours} makes {f.calls} calls of f in {steps} fixed steps, where {expected} are expected. If "
                "this is intended, set calls_per_step in the test class, to None if it varies.",
            )
            require(
                torch.equal(solution.value, self._iterates(problem, problem.start, steps)[-1][1]),
                f"{self._yours} gives a different answer after {steps} fixed steps than its init and step do when they "
                "are called directly.",
            )

    def test_steps_past_convergence_stay_finite(self) -> None:
        """Further steps at the solution, where all differences vanish, stay at the solution."""
        z0 = torch.zeros(3, 4, dtype=torch.float64)
        for name, f, expected in (("z -> z / 2 + 1", lambda z: z / 2 + 1, 2.0), ("z -> 1", torch.ones_like, 1.0)):
            steps = 2 * int(self._solve(f, z0, rtol=1e-12).num_steps.max()) + 20
            value = solve(f, z0, self.solver, rtol=None, atol=None, max_steps=steps).value
            require(
                ((value - expected).abs() < 1e-6).all(),
                f"{self._yours} does not stay at the solution {expected} of {name} in {steps} fixed steps: it "
                f"ends at {value[0].tolist()}. Guard divisions by differences that vanish, row by row: "
                "torch.where(d > 0, n / torch.where(d > 0, d, 1), 0).",
            )

    def test_batch_dims(self) -> None:
        """Any number of leading dimensions may index the samples; the shapes of the solution follow from it."""
        shape = (4, 3, 5)
        shift = RowContractions.make(12, 5).shift.reshape(shape)
        expected = _iterate(lambda z: 0.5 * torch.cos(z) + shift, torch.zeros_like(shift))
        for batch_dims in (0, 1, 2, 3):
            solution = self._solve(
                lambda z: 0.5 * torch.cos(z) + shift, torch.zeros_like(shift), batch_dims=batch_dims, history=True
            )
            batch = shape[:batch_dims]
            require(
                solution.value.shape == shape and solution.status.shape == batch == solution.history.shape[1:],  # type: ignore[union-attr]
                f"{self._yours} returns a value of shape {tuple(solution.value.shape)} and a status of shape "
                f"{tuple(solution.status.shape)} with batch_dims={batch_dims} for a state of shape {shape}.",
            )
            self._require_near(solution.value, expected, f"with batch_dims={batch_dims} for a state of shape {shape}")

    def test_small_and_empty_batches(self) -> None:
        """The solver works with no samples, one sample, one entry, no entries, and a scalar state."""
        for shape, batch_dims in (((0, 3), 1), ((1, 3), 1), ((3, 1), 1), ((1, 1), 1), ((2, 0), 1), ((), 0), ((1,), 1)):
            z0 = torch.zeros(shape, dtype=torch.float64)
            solution = self._solve(lambda z: 0.5 * torch.cos(z) + 1, z0, batch_dims=batch_dims)
            require(
                solution.value.shape == shape and solution.status.shape == shape[:batch_dims],
                f"{self._yours} returns a value of shape {tuple(solution.value.shape)} for a state of shape {shape}.",
            )
            expected = _iterate(lambda z: 0.5 * torch.cos(z) + 1, z0)
            self._require_near(solution.value, expected, f"for a state of shape {shape}, batch_dims={batch_dims}")

    def test_pytree_state(self) -> None:
        """A problem takes the same steps to the same answer as one tensor and as a nested pytree."""
        problem = RowContractions.make()

        def split(z: Tensor) -> dict[str, Any]:
            return {"x": z[:, :6].reshape(-1, 3, 2), "y": (z[:, 6:15], [z[:, 15]])}

        def join(tree: dict[str, Any]) -> Tensor:
            return torch.cat((tree["x"].flatten(1), tree["y"][0], tree["y"][1][0].unsqueeze(1)), dim=1)

        whole = self._solve(problem, problem.start)
        parts = self._solve(lambda tree: split(problem(join(tree))), split(problem.start))
        parts.value = join(parts.value)
        self._require_same(parts, whole, "for the same state as a pytree of tensors")

    def test_layout_of_the_start_does_not_matter(self) -> None:
        """Transposed and expanded starts, which are not contiguous, give the same answer."""
        problem = RowContractions.make()
        reference = self._solve(problem, torch.ones_like(problem.shift))
        for how, z0 in (
            ("a transposed", torch.ones_like(problem.shift.T).T),
            ("an expanded", torch.ones(1, 1, dtype=torch.float64).expand_as(problem.shift)),
        ):
            self._require_same(self._solve(problem, z0), reference, f"from {how} start")

    def test_grad_modes(self) -> None:
        """The solver works under ``torch.no_grad`` and ``torch.inference_mode``, and while gradients are recorded."""
        problem = RowContractions.make()
        reference = self._solve(problem, problem.start)
        with torch.no_grad():
            self._require_same(self._solve(problem, problem.start), reference, "under torch.no_grad")
        with torch.inference_mode():
            self._require_same(self._solve(problem, problem.start), reference, "under torch.inference_mode")
        z0 = problem.start.requires_grad_()
        solution = self._solve(problem, z0)
        solution.value = solution.value.detach()
        self._require_same(solution, reference, "from a start that requires a gradient")

    def _require_near(self, value: Tensor, expected: Tensor, what: str) -> None:
        __tracebackhide__ = True
        require(
            torch.allclose(value, expected, rtol=1e-4, atol=1e-4),
            f"{self._yours} gives a wrong answer {what}.",
        )


def _iterate(f: Any, z: Tensor) -> Tensor:
    for _ in range(100):
        z = f(z)
    return z
