"""Tests that gradients flow through the steps of a solver."""

import dataclasses
import unittest

import torch
from torch import Tensor

from solvers._solve import solve
from solvers.testing.conformance._base import INDEPENDENCE, ConformanceTests, require
from solvers.testing.row_contractions import RowContractions


class GradientTests(ConformanceTests):
    """Derivatives of the steps are right, stay within their sample, and are finite where differences vanish."""

    def test_gradients_through_fixed_steps(self) -> None:
        """Gradients with respect to the start and to tensors of the map agree with finite differences."""
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
                f"{self._yours} has a derivative with respect to {name} of {derivative:.8f} by backpropagation through "
                f"4 steps, and {expected:.8f} by finite differences. Use only operations that autograd differentiates "
                "in init and step.",
            )

    def test_gradients_belong_to_their_sample(self) -> None:
        """The answer for one sample has no gradient with respect to the inputs of another."""
        self._require_differentiable()
        problem = RowContractions.make(batch=3, size=5)
        shift = problem.shift.clone().requires_grad_()
        f = dataclasses.replace(problem, shift=shift)
        value = solve(f, problem.start, self.solver, rtol=None, atol=None, max_steps=4).value
        gradient = self._gradient(value[1].sum(), shift, "a tensor of the map")
        require(
            not gradient[[0, 2]].any(),
            f"{self._yours} lets the answer for a sample depend on the inputs of another one. {INDEPENDENCE}",
        )

    def test_gradients_are_finite_past_convergence(self) -> None:
        """Samples that are solved before others, or before the last step, have the gradient of the fixed point."""
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
                f"{gradient[:, 0].tolist()} instead of {expected[:, 0].tolist()}. Check for divisions by zero and "
                "square roots at zero. torch.where must guard their argument as well, since autograd also computes the "
                "gradient of the branch that is not taken.",
            )

    def _require_differentiable(self) -> None:
        if not self.solver.differentiable:
            raise unittest.SkipTest(f"{self._yours} says differentiable = False.")

    def _gradient(self, total: Tensor, leaf: Tensor, name: str) -> Tensor:
        """Return the gradient of ``total`` with respect to ``leaf``, which must exist."""
        __tracebackhide__ = True
        leaf.grad = None
        if total.requires_grad:
            total.backward()
        gradient: Tensor | None = leaf.grad
        if gradient is None:
            raise AssertionError(
                f"{self._yours} cuts the gradient to {name}: do not use detach, torch.no_grad or .data in init and "
                "step. If gradients should not flow through it, set differentiable: ClassVar[bool] = False in its "
                "class."
            )
        return gradient
