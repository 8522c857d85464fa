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

from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from imixer.imlp import IMLP
from implicit import Backward, power_iterations_advanced
from solvers import Solver

__all__ = ["IMixer", "IMixerBlock"]


class IMixerBlock(MixerBlock):
    """timm's mixer block with an iMLP as the token mixer.

    Args:
        dim: Channels.
        seq_len: Tokens.
        mlp_ratio: Hidden sizes as multiples of ``dim``: of the token mixer's state, of the channel mixer.
        h_ratio: As in :class:`IMLP`, and so on.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        *,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        h_ratio: float,
        n_iter: int,
        n_power: int,
        coeff: float,
        solver: Solver | str,
        backward: Backward | str,
        rtol: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__(
            dim, seq_len, mlp_ratio, act_layer=act_layer, drop=drop, device=device, dtype=dtype, **block_args
        )
        tokens_ratio = mlp_ratio[0] if isinstance(mlp_ratio, tuple) else mlp_ratio
        self.mlp_tokens = IMLP(
            seq_len,
            int(tokens_ratio * dim),
            act_layer=act_layer,
            drop=drop,
            h_ratio=h_ratio,
            n_iter=n_iter,
            n_power=n_power,
            coeff=coeff,
            solver=solver,
            backward=backward,
            rtol=rtol,
            device=device,
            dtype=dtype,
        )


class IMixer(MlpMixer):
    """MLP-Mixer with implicit token mixing: images (B, C, H, W) to logits (B, classes).

    Args:
        h_ratio: Width of the inner layer of each iMLP's block, as a multiple of its state's.
        n_iter: Steps of each solve: exactly so many when ``rtol`` is None, else at most.
        n_power: Power iterations of the spectral normalization a training step.
        coeff: Bound on the spectral norms inside the block.
        solver: A solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance of each solve, or None for a fixed number of steps.
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
        **mixer_args: Any,
    ) -> None:
        img_size, patch_size = mixer_args.get("img_size", 224), mixer_args.get("patch_size", 16)
        if any(side % patch for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)):
            raise ValueError(
                f"img_size={img_size} is no multiple of patch_size={patch_size}: the border would be left out. Choose "
                "another patch_size, or resize the images."
            )
        block_layer = partial(
            IMixerBlock,
            h_ratio=h_ratio,
            n_iter=n_iter,
            n_power=n_power,
            coeff=coeff,
            solver=solver,
            backward=backward,
            rtol=rtol,
        )
        super().__init__(block_layer=block_layer, **mixer_args)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, embed_dim)."""
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
        "imixer_ti4_32.untrained": _cfg_32(),
        "imixer_s4_32.untrained": _cfg_32(),
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
