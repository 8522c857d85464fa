"""The iMLP: a token mixer whose hidden layer is an implicit layer."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from imixer.checkpoint import translate_published_keys
from implicit import Backward, FixedPointLayer, SpectralNorm, spectral_norm
from solvers import Solver


class IMLP(nn.Module):
    """``fc2(act(z))`` at the solution of ``z = y + g(z)``, with ``y = fc1(x)`` and ``g = sn2 o act o sn1 o act``.

    The contractive block of a three-layer hierarchical Hopfield network takes the place of the hidden layer of an MLP.
    ``sn1`` and ``sn2`` are linear layers under soft spectral normalization; their weights are computed once a forward
    pass and enter the map as explicit tensors. The start is ``z = y``. As in the paper, the default solve is
    ``n_iter`` Picard steps, trained end to end.

    A drop-in for ``timm.layers.Mlp``: maps (..., in_features) to (..., out_features), every row by itself.

    Args:
        in_features: Size of the last dimension of the input.
        hidden_features: Size D of the implicit state; by default ``in_features``.
        out_features: Size of the last dimension of the output; by default ``in_features``.
        act_layer: Makes the activation.
        bias: Whether the four linear layers have one.
        drop: Dropout rate after the activation of the solution and after ``fc2``.
        h_ratio: Width of the block's inner layer, as a multiple of D.
        n_iter: Steps of the solver: exactly so many when ``rtol`` is None, else at most.
        n_power: Power iterations a forward pass in training mode.
        coeff: Bound on the spectral norms of ``sn1`` and ``sn2``.
        solver: A solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance of the solve, or None for a fixed number of steps. Rows that do not reach it in
            ``n_iter`` steps are a ``solvers.ConvergenceWarning``.
        device: Where the parameters are made.
        dtype: Of the parameters.

    References:
        Ota and Taki, "iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer",
        arXiv:2304.13061 (2023), section 4.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        h_ratio: float = 2.0,
        n_iter: int = 2,
        n_power: int = 8,
        coeff: float = 0.9,
        solver: Solver | str = "picard",
        backward: Backward | str = "unrolled",
        rtol: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state = hidden_features or in_features
        inner = int(state * h_ratio)
        if inner < 1:
            raise ValueError(f"h_ratio={h_ratio!r} leaves the block of a state of size {state} no inner layer.")
        if not isinstance(n_iter, int) or n_iter < 1:
            raise ValueError(f"n_iter, the number of solver steps, must be a positive integer, got {n_iter!r}.")

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.fc1 = linear(in_features, state)
        self.fc_sn1 = spectral_norm(linear(state, inner), coeff=coeff, n_power_iterations=n_power)
        self.fc_sn2 = spectral_norm(linear(inner, state), coeff=coeff, n_power_iterations=n_power)
        self.fc2 = linear(state, out_features or in_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.drop2 = nn.Dropout(drop)
        self.fixed_point = FixedPointLayer(
            ContractiveBlock(self.act),
            solver=solver,
            backward=backward,
            init=_start_at_injection,
            rtol=rtol,
            atol=None if rtol is None else 0.0,
            max_steps=n_iter,
        )
        self.register_load_state_dict_pre_hook(_translate_on_load)  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Xavier-uniform weights for the normalized layers.

        timm's own initialization takes care of the rest; here it would write to computed copies.
        """
        for layer in self.normalized_layers:
            # Assigning settles the singular vectors as well.
            layer.weight = nn.init.xavier_uniform_(torch.empty_like(layer.weight))

    @property
    def normalized_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers of the block, ``sn1`` and ``sn2``."""
        return self.fc_sn1, self.fc_sn2

    @property
    def sigmas(self) -> tuple[float, float]:
        """Spectral norms of the two layers before normalization, as the power iteration has them."""
        found = []
        for layer in self.normalized_layers:
            parametrization = cast(nn.ModuleDict, layer.parametrizations)["weight"]
            assert isinstance(parametrization, ParametrizationList)
            norm = parametrization[0]
            assert isinstance(norm, SpectralNorm)
            found.append(float(norm.sigma(parametrization.original)))
        return found[0], found[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = self.fc1(x)
        sn1, sn2 = self.normalized_layers
        rows = y.flatten(0, -2)  # (rows, D): every row is a problem of its own
        z = self.fixed_point(rows, sn1.weight, sn1.bias, sn2.weight, sn2.bias)
        z = self.drop1(self.act(z.view_as(y)))
        output: Tensor = self.drop2(self.fc2(z))
        return output


class ContractiveBlock(nn.Module):
    """The map ``z -> y + sn2(act(sn1(act(z))))``; all tensors but the activation's own are arguments."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(
        self, z: Tensor, y: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
    ) -> Tensor:
        hidden = self.act(F.linear(self.act(z), weight1, bias1))
        return y + F.linear(hidden, weight2, bias2)


def _start_at_injection(y: Tensor, *_: Tensor | None) -> Tensor:
    return y


def _translate_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    translate_published_keys(state_dict, prefix)
