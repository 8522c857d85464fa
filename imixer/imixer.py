"""iMixer models, registered with timm.

Paper: "iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer",
https://arxiv.org/abs/2304.13061

@article{ota2023imixer,
  title={iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer},
  author={Ota, Toshihiro and Taki, Masato},
  journal={arXiv preprint arXiv:2304.13061},
  year={2023}
}

An iMixer is timm's MLP-Mixer with an iMLP in the place of each token-mixing MLP; everything else is timm's code.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from imixer.imlp import IMLP, Contraction, HiddenSolve, Norm, change_solvers
from imixer.shipped_weights import pretrained_cfgs
from implicit import Backward, power_iterations_advanced
from solvers import Solver

__all__ = ["IMixer", "IMixerBlock"]


class IMixerBlock(MixerBlock):
    """timm's mixer block with another token mixer.

    Args:
        dim: Channels.
        seq_len: Tokens.
        mlp_ratio: Hidden sizes as multiples of ``dim``: of the token mixer, of the channel mixer.
        token_mixer: Makes the token mixer, with the arguments of ``timm.layers.Mlp``; an iMLP by default.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        *,
        token_mixer: Callable[..., nn.Module] = IMLP,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        shared: dict[str, Any] = {"act_layer": act_layer, "drop": drop, "device": device, "dtype": dtype}
        super().__init__(dim, seq_len, mlp_ratio, **shared, **block_args)
        self.mlp_tokens = token_mixer(seq_len, int(to_2tuple(mlp_ratio)[0] * dim), **shared)


class IMixer(MlpMixer):
    """MLP-Mixer with implicit token mixing: images (B, C, H, W) to logits (B, classes).

    The arguments of each :class:`IMLP`, which says more about them:

    Args:
        h_ratio: Width of the inner layers of each iMLP's map, as a multiple of its state's.
        n_iter: Steps of each solve: exactly so many when ``rtol`` is None, else at most.
        n_power: Power iterations of the spectral normalization a training step.
        coeff: Bound on the spectral norms inside the map, or, if certified, on its Lipschitz constant.
        solver: A solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance of each solve, or None for a fixed number of steps.
        hidden_layers: Hidden layers of each iMLP: 1 is MLP-Mixer, 2 the paper's model.
        hidden_solve: How three and more of them are solved for: "nested" or "joint".
        tied: Whether couplings are symmetric.
        norm: Normalization inside the map: "spectral", "none", "batch" or "weight".
        contraction: "paper", or "certified" to guarantee that the map contracts.
        **mixer_args: All that ``timm.models.mlp_mixer.MlpMixer`` takes: ``img_size``, ``patch_size``, ``num_blocks``,
            ``embed_dim``, ``num_classes``, ``drop_path_rate`` ...
    """

    def __init__(
        self,
        *,
        h_ratio: float = 2.0,
        n_iter: int = 2,
        n_power: int = 8,
        coeff: float = 0.9,
        solver: Solver | str = "picard",
        backward: Backward | str = "unrolled",
        rtol: float | None = None,
        hidden_layers: int = 2,
        hidden_solve: HiddenSolve = "nested",
        tied: bool = False,
        norm: Norm = "spectral",
        contraction: Contraction = "paper",
        **mixer_args: Any,
    ) -> None:
        img_size, patch_size = mixer_args.get("img_size", 224), mixer_args.get("patch_size", 16)
        if any(side % patch for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)):
            raise ValueError(
                f"img_size={img_size} is no multiple of patch_size={patch_size}: the border would be left out. Choose "
                "another patch_size, or resize the images."
            )
        token_mixer = partial(
            IMLP,
            h_ratio=h_ratio,
            n_iter=n_iter,
            n_power=n_power,
            coeff=coeff,
            solver=solver,
            backward=backward,
            rtol=rtol,
            hidden_layers=hidden_layers,
            hidden_solve=hidden_solve,
            tied=tied,
            norm=norm,
            contraction=contraction,
        )
        block_layer = partial(IMixerBlock, token_mixer=token_mixer)
        super().__init__(block_layer=block_layer, **mixer_args)  # type: ignore[arg-type]

    def set_solver(
        self,
        *,
        n_iter: int | EllipsisType = ...,
        solver: Solver | str | EllipsisType = ...,
        rtol: float | EllipsisType | None = ...,
        backward: Backward | str | EllipsisType = ...,
    ) -> "IMixer":
        """Solve in another way from now on, in every iMLP: more steps than in training, to a tolerance, faster.

        What is not given stays as it is, and if a value is unfit, all does. The weights were trained with the old
        solve: what another does to the accuracy has to be looked at. A state dict does not hold these settings.

        Args:
            n_iter: As at construction, and so on.
            solver: Likewise.
            rtol: Likewise; None takes exactly ``n_iter`` steps.
            backward: Likewise.

        Returns:
            The model itself.

        Raises:
            TypeError, ValueError: A value is unfit, or solver and backward mode cannot go together.

        Example:
            >>> import timm
            >>> import imixer
            >>> model = timm.create_model("imixer_ti4_32")
            >>> model = model.set_solver(solver="anderson", n_iter=30, rtol=1e-4)
        """
        imlps = [module for module in self.modules() if isinstance(module, IMLP)]
        change_solvers(imlps, n_iter=n_iter, solver=solver, rtol=rtol, backward=backward)
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, embed_dim)."""
        if isinstance(x, torch.fx.Proxy):  # traced without values, where every iMLP is a leaf and advances its own
            return super().forward_features(x)
        with power_iterations_advanced(self.blocks):
            return super().forward_features(x)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's: features of several blocks."""
        with power_iterations_advanced(self.blocks):
            return super().forward_intermediates(*args, **kwargs)


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **overrides,
    }


def _cfg_32() -> dict[str, Any]:
    return _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "imixer_s32_224.untrained": _cfg(),
        "imixer_s16_224.untrained": _cfg(),
        "imixer_b32_224.untrained": _cfg(),
        "imixer_b16_224.untrained": _cfg(),
        "imixer_l32_224.untrained": _cfg(),
        "imixer_l16_224.untrained": _cfg(),
        **pretrained_cfgs("imixer_ti4_32", _cfg_32()),
        **pretrained_cfgs("imixer_s4_32", _cfg_32()),
    }
)


def _create_imixer(variant: str, pretrained: bool, architecture: dict[str, int], overrides: dict[str, Any]) -> IMixer:
    """Build a variant; whatever the caller names in ``overrides`` goes before the architecture's own."""
    arguments = {**architecture, **overrides}
    out_indices = arguments.pop("out_indices", 3)
    return build_model_with_cfg(
        IMixer, variant, pretrained, feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **arguments
    )


@register_model
def imixer_s32_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-S/32, 224 pixels."""
    return _create_imixer("imixer_s32_224", pretrained, {"patch_size": 32, "num_blocks": 8, "embed_dim": 512}, kwargs)


@register_model
def imixer_s16_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-S/16, 224 pixels."""
    return _create_imixer("imixer_s16_224", pretrained, {"patch_size": 16, "num_blocks": 8, "embed_dim": 512}, kwargs)


@register_model
def imixer_b32_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-B/32, 224 pixels."""
    return _create_imixer("imixer_b32_224", pretrained, {"patch_size": 32, "num_blocks": 12, "embed_dim": 768}, kwargs)


@register_model
def imixer_b16_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-B/16, 224 pixels."""
    return _create_imixer("imixer_b16_224", pretrained, {"patch_size": 16, "num_blocks": 12, "embed_dim": 768}, kwargs)


@register_model
def imixer_l32_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-L/32, 224 pixels."""
    return _create_imixer("imixer_l32_224", pretrained, {"patch_size": 32, "num_blocks": 24, "embed_dim": 1024}, kwargs)


@register_model
def imixer_l16_224(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-L/16, 224 pixels."""
    return _create_imixer("imixer_l16_224", pretrained, {"patch_size": 16, "num_blocks": 24, "embed_dim": 1024}, kwargs)


@register_model
def imixer_ti4_32(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-Ti/4, 32 pixels: trains on a laptop's processor."""
    return _create_imixer("imixer_ti4_32", pretrained, {"patch_size": 4, "num_blocks": 4, "embed_dim": 64}, kwargs)


@register_model
def imixer_s4_32(pretrained: bool = False, **kwargs: Any) -> IMixer:
    """iMixer-S/4, 32 pixels."""
    return _create_imixer("imixer_s4_32", pretrained, {"patch_size": 4, "num_blocks": 8, "embed_dim": 256}, kwargs)
