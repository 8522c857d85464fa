"""Lagrangians: scalar functions of a layer's state, whose gradients are its activation functions."""

import abc
import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Lagrangian(abc.ABC):
    """A function L of the last dimension, with its gradient and Hessian in closed form.

    Leading dimensions are a batch. To add one, derive a frozen dataclass and write the three methods.

    Attributes:
        convex: Whether the Hessian is positive semi-definite everywhere. If it is for every layer, the energy of a
            network never increases.
    """

    convex: ClassVar[bool] = True

    @abc.abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """L(x): (..., n) -> (...)."""

    @abc.abstractmethod
    def activation(self, x: Tensor) -> Tensor:
        """The gradient of L at x: (..., n) -> (..., n)."""

    @abc.abstractmethod
    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        """The Hessian of L at x times a direction: (..., n), (..., n) -> (..., n)."""


class Identity(Lagrangian):
    """``|x|^2 / 2``; the activation is x."""

    def value(self, x: Tensor) -> Tensor:
        return x.square().sum(-1) / 2

    def activation(self, x: Tensor) -> Tensor:
        return x

    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        return direction.expand_as(x)


class ReLU(Lagrangian):
    """``sum_i max(x_i, 0)^2 / 2``; the activation is relu, with slope 0 at 0."""

    def value(self, x: Tensor) -> Tensor:
        return F.relu(x).square().sum(-1) / 2

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        return torch.where(x > 0, direction, 0.0)


@dataclasses.dataclass(frozen=True)
class Softmax(Lagrangian):
    """``log(sum_i exp(beta x_i)) / beta``; the activation is ``softmax(beta x)``.

    As the hidden layer it makes a memory of exponentially many patterns, whose update is attention.

    Args:
        beta: Inverse temperature, positive: the larger, the closer the activation is to one-hot.

    References:
        Ramsauer et al., "Hopfield networks is all you need", ICLR (2021).
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"Softmax(beta=...), an inverse temperature, must be > 0, got {self.beta!r}.")

    def value(self, x: Tensor) -> Tensor:
        return (self.beta * x).logsumexp(-1) / self.beta

    def activation(self, x: Tensor) -> Tensor:
        return (self.beta * x).softmax(-1)

    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        p = self.activation(x)
        return self.beta * p * (direction - (p * direction).sum(-1, keepdim=True))


class GELU(Lagrangian):
    """``sum_i ((x_i^2 - 1) Phi(x_i) + x_i phi(x_i)) / 2``; the activation is ``gelu(x) = x Phi(x)``.

    Phi and phi are the distribution function and the density of the standard normal distribution; the constant of
    integration makes L vanish at minus infinity. The slope of gelu is negative below -0.75, and -0.13 at its lowest:
    L is not convex, so that the energy of a network with this layer can increase.
    """

    convex: ClassVar[bool] = False

    def value(self, x: Tensor) -> Tensor:
        # Not in the form above, where x^2 Phi is inf * 0 for a very negative x.
        distribution = _normal_distribution(x)
        return (x * (x * distribution + _normal_density(x)) - distribution).sum(-1) / 2

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        return (_normal_distribution(x) + x * _normal_density(x)) * direction


class CentredNorm(Lagrangian):
    """``L(x) = sqrt(sum_i (x_i - mean x)^2)``; the activation is ``(x - mean x) / L``.

    The activation is LayerNorm without its affine part and its epsilon, divided by sqrt(n). L is homogeneous of degree
    one: its Hessian annihilates x, and ``x . activation(x) = L``.

    Where all entries are equal, L is zero and has a kink. There the activation is 0, the shortest of its subgradients
    and what LayerNorm returns; the Hessian, which grows without bound on the way there, is taken as 0 as well.
    """

    def value(self, x: Tensor) -> Tensor:
        _, size, norm = self._parts(x)
        return (size * norm).squeeze(-1)

    def activation(self, x: Tensor) -> Tensor:
        direction, _, norm = self._parts(x)
        return direction * _inverse(norm)

    def hvp(self, x: Tensor, direction: Tensor) -> Tensor:
        unscaled, size, norm = self._parts(x)
        inverse = _inverse(norm)
        g = unscaled * inverse  # the activation
        along = (g * direction).sum(-1, keepdim=True)
        return (_centred(direction) - along * g) * inverse / size

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x - mean x as a direction (..., n) times a size (..., 1), and the norm of that direction (..., 1).

        So squares neither overflow nor vanish.
        """
        centred = _centred(x)
        size = centred.detach().abs().amax(-1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        direction = centred / size
        return direction, size, torch.linalg.vector_norm(direction, dim=-1, keepdim=True)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, or 0 where that is 0."""
    # Twice, because a division by zero in a branch that is not taken still makes the gradient nan.
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)


def _normal_distribution(x: Tensor) -> Tensor:
    distribution: Tensor = torch.special.ndtr(x)
    return distribution


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _centred(x: Tensor) -> Tensor:
    # The mean of equal numbers need not be rounded to that number; that of zeros is zero.
    x = x - x[..., :1]
    return x - x.mean(-1, keepdim=True)
