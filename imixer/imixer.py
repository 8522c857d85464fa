"""iMixer models, registered with timm.

Paper: "iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer",
https://arxiv.org/abs/2304.13061

@article{ota2023imixer,
  title={iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer},
  author={Ota, Toshihiro and Taki, Masato},
  journal={arXiv preprint arXiv:2304.13061},
  year={2023}
}

An iMixer is timm's MLP-Mixer with an iMLP instead of each token-mixing MLP; everything else is timm's code.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from imixer.imlp import IMLP, change_solvers
from imixer.imlp_options import IMLP_OPTIONS, IMLPOptions, SolverChanges, check_names, lists_options
from imixer.shipped_weights import pretrained_cfgs
from implicit import power_iterations_advanced

__all__ = ["IMixer", "IMixerBlock"]

_MIXER_ARGUMENTS = [name for name in inspect.signature(MlpMixer).parameters if name != "block_layer"]


class IMixerArguments(IMLPOptions, total=False):
    """The keyword arguments of an :class:`IMixer`: the options of its iMLPs, and timm's for an ``MlpMixer``."""

    num_classes: int
    img_size: int | tuple[int, int]
    in_chans: int
    patch_size: int | tuple[int, int]
    num_blocks: int
    embed_dim: int
    mlp_ratio: float | tuple[float, float]
    mlp_layer: Callable[..., nn.Module]
    norm_layer: Callable[..., nn.Module]
    act_layer: Callable[..., nn.Module]
    drop_rate: float
    proj_drop_rate: float
    drop_path_rate: float
    nlhb: bool
    stem_norm: bool
    global_pool: Literal["", "avg"]
    device: torch.device | str | None
    dtype: torch.dtype | None


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


@lists_options
class IMixer(MlpMixer):
    """MLP-Mixer with implicit token mixing: images (B, C, H, W) to logits (B, classes).

    Everything except the token mixer is timm's code.

    Args:
        **arguments: The options of :class:`imixer.IMLPOptions`, for each :class:`imixer.IMLP`, and the arguments of
            ``timm.models.mlp_mixer.MlpMixer``: ``img_size``, ``patch_size``, ``num_blocks``, ``embed_dim``,
            ``num_classes``, ``drop_path_rate`` and so on.

    Raises:
        TypeError: There is no such argument; the message lists those that there are.
        ValueError: A value is not valid.
    """

    def __init__(self, **arguments: Unpack[IMixerArguments]) -> None:
        check_names("An iMixer", arguments, [*_MIXER_ARGUMENTS, *IMLP_OPTIONS])
        options: Any = {name: value for name, value in arguments.items() if name in IMLP_OPTIONS}
        mixer_arguments: Any = {name: value for name, value in arguments.items() if name not in IMLP_OPTIONS}
        img_size, patch_size = mixer_arguments.get("img_size", 224), mixer_arguments.get("patch_size", 16)
        if any(side % patch for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)):
            raise ValueError(
                f"img_size={img_size} is no multiple of patch_size={patch_size}: the border would be left out. Choose "
                "another patch_size, or resize the images."
            )
        block_layer = partial(IMixerBlock, token_mixer=partial(IMLP, **options))
        super().__init__(block_layer=block_layer, **mixer_arguments)  # type: ignore[arg-type]

    def set_solver(self, **changes: Unpack[SolverChanges]) -> "IMixer":
        """Change how every iMLP solves from now on: more steps than in training, a tolerance, another solver.

        What is not given stays as it is. If a value is not valid, nothing changes. The weights were trained with the
        old solve, so look at what the new one does to the accuracy. A state dict does not hold these settings.

        Args:
            **changes: Any of ``n_iter``, ``solver``, ``backward`` and ``rtol``, as at construction; with ``rtol=None``
                a solve takes exactly ``n_iter`` steps.

        Returns:
            The model itself.

        Raises:
            TypeError, ValueError: A name or a value is not valid, or two of them cannot go together.

        Example:
            >>> import timm
            >>> import imixer
            >>> model = timm.create_model("imixer_ti4_32")
            >>> model = model.set_solver(solver="anderson", n_iter=30, rtol=1e-4)
        """
        imlps = [module for module in self.modules() if isinstance(module, IMLP)]
        change_solvers(imlps, changes)
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
    """Build a variant; what the caller names in ``overrides`` replaces the architecture's own."""
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
