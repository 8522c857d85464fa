"""That gradients flow through a solver's steps."""

import dataclasses
import unittest

import torch
from torch import Tensor

from solvers._solve import solve
from solvers.testing.conformance._base import ConformanceTests, require
from solvers.testing.row_contractions import RowContractions


class GradientTests(ConformanceTests):
    """The derivative of the steps is right, belongs to its own sample, and is finite where differences vanish."""

    def test_gradients_through_fixed_steps(self) -> None:
        """They agree with finite differences, for the start and for the map's own tensors."""
        self._require_differentiable()
        problem = RowContractions.make(batch=3, size=5)
        cotangent = problem.shift.flip(0)

        def loss(z0: Tensor, shift: Tensor) -> Tensor:
            f = dataclasses.replace(problem, shift=shift)
            value: Tensor = solve(f, z0, self.solver, rtol=None, atol=None, max_steps=4).value
            return (value * cotangent).sum()

        point = (problem.shift.flip(1), problem.shift)
        direction = problem.shift.roll(1, 0)
        for i, name in enumerate(("the start", "a tensor of the map")):
            leaves = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(point)]
            gradient = self._gradient(loss(*leaves), leaves[i], name)
            ahead, behind = [*point], [*point]
            ahead[i], behind[i] = point[i] + 1e-6 * direction, point[i] - 1e-6 * direction
            with torch.no_grad():
                expected = float(loss(*ahead) - loss(*behind)) / 2e-6
            derivative = float((gradient * direction).sum())
            require(
                abs(derivative - expected) <= 1e-6 * (1 + abs(expected)),
                f"{self._yours} has the derivative {derivative:.8f} to {name} by backpropagation through 4 steps, and "
                f"{expected:.8f} by finite differences.",
            )

    def test_gradients_belong_to_their_sample(self) -> None:
        """One sample's answer has no gradient to another's inputs."""
        self._require_differentiable()
        problem = RowContractions.make(batch=3, size=5)
        shift = problem.shift.clone().requires_grad_()
        f = dataclasses.replace(problem, shift=shift)
        value = solve(f, problem.start, self.solver, rtol=None, atol=None, max_steps=4).value
        gradient = self._gradient(value[1].sum(), shift, "a tensor of the map")
        require(
            not gradient[[0, 2]].any(),
            f"{self._yours} lets a sample's answer depend on the inputs of another one.",
        )

    def test_gradients_are_finite_past_convergence(self) -> None:
        """Samples that are solved, by themselves or beside others that go on, have the fixed point's gradient."""
        self._require_differentiable()
        rate = torch.tensor([[0.0], [0.3], [0.9]], dtype=torch.float64)
        expected = (1 / (1 - rate)).expand(3, 5)
        shift = RowContractions.make(batch=3, size=5).shift.requires_grad_()

        def f(z: Tensor) -> Tensor:
            return rate * z + shift

        solution = self._solve(f, torch.zeros_like(shift), rtol=1e-9)
        steps = 2 * int(solution.num_steps.max()) + 10
        fixed = solve(f, torch.zeros_like(shift), self.solver, rtol=None, atol=None, max_steps=steps)
        for what, value in ((f"in {steps} fixed steps", fixed.value), ("beside others that go on", solution.value)):
            gradient = self._gradient(value.sum(), shift, "a tensor of the map")
            require(
                torch.allclose(gradient, expected, rtol=1e-3),
                f"{self._yours} has wrong gradients for samples that are solved before the last step, {what}: "
                f"{gradient[:, 0].tolist()} in place of {expected[:, 0].tolist()}. Beware of divisions by zero and of "
                "square roots at zero: torch.where must be inside of them too, for the gradient of the branch that is "
                "not taken is computed nevertheless.",
            )

    def _require_differentiable(self) -> None:
        if not self.solver.differentiable:
            raise unittest.SkipTest(f"{self._yours} says differentiable = False.")

    def _gradient(self, total: Tensor, leaf: Tensor, name: str) -> Tensor:
        """The gradient of ``total`` to ``leaf``, which must have one."""
        __tracebackhide__ = True
        leaf.grad = None
        if total.requires_grad:
            total.backward()
        gradient: Tensor | None = leaf.grad
        if gradient is None:
            raise AssertionError(
                f"{self._yours} cuts the gradient to {name}: no detach, no torch.no_grad, no .data in init and step. "
                "If gradients are not meant to flow through, say differentiable: ClassVar[bool] = False in its class."
            )
        return gradient
