"""What the parametrizations of spectral normalization share."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator


class SpectralNorm(nn.Module, ABC):
    """The parametrization behind :func:`spectral_norm`: ``weight / max(1, sigma / coeff)``.

    Attributes:
        coeff: The largest spectral norm that is left alone.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float) -> None:
        super().__init__()
        if not coeff > 0:
            raise ValueError(f"spectral_norm(coeff=...) must be > 0, got {coeff!r}.")
        self.operator = operator
        self.coeff = coeff

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight, of the same shape and dtype."""

    @abstractmethod
    def sigma(self, weight: Tensor) -> Tensor:
        """The spectral norm of the unnormalized ``weight`` as the method has it, without gradient."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that the weight becomes this one: itself, normalized only if it must be."""
        return weight


def check_positive(name: str, value: int) -> None:
    """Raise where an option is no positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"spectral_norm({name}=...) must be an int >= 1, got {value!r}.")
