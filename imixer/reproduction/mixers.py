"""timm's MLP-Mixer at the sizes of the small iMixers, which timm has no names for. Importing it registers them."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"mixer_ti4_32.untrained": _cfg(), "mixer_s4_32.untrained": _cfg()})


@register_model
def mixer_ti4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """timm's Mixer with the blocks, the width and the patches of imixer_ti4_32."""
    sizes = {"patch_size": 4, "num_blocks": 4, "embed_dim": 64}
    return build_model_with_cfg(MlpMixer, "mixer_ti4_32", pretrained, **{**sizes, **kwargs})


@register_model
def mixer_s4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """timm's Mixer with the blocks, the width and the patches of imixer_s4_32."""
    sizes = {"patch_size": 4, "num_blocks": 8, "embed_dim": 256}
    return build_model_with_cfg(MlpMixer, "mixer_s4_32", pretrained, **{**sizes, **kwargs})
