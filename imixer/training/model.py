"""The model of a run: built from its settings and the images."""

import difflib
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import imixer.imixer  # noqa: F401  registers the models
from imixer.data import ImageData
from imixer.training.config import TrainingConfig


def check_model_name(name: str) -> None:
    """Raise a ValueError that lists what exists if timm knows no model of this name."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    imixers = ", ".join(timm.list_models("imixer*"))
    raise ValueError(f"unknown model {name!r}; {hint}the iMixers are {imixers}")


def model_arguments(config: TrainingConfig, data: ImageData) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that `config` sets or `data` demands."""
    img_size, patch_size = config.img_size, config.patch_size
    if config.data_dir is None and not config.dataset:
        # Digits are smaller than any model's own size, and its own patches would leave few tokens.
        img_size = data.img_size
        patch_size = patch_size or max(img_size // 4, 1)
    arguments = {
        "num_classes": len(data.classes),
        "in_chans": data.in_chans,
        "img_size": img_size,
        "patch_size": patch_size,
        "num_blocks": config.num_blocks,
        "embed_dim": config.embed_dim,
        "h_ratio": config.h_ratio,
        "n_iter": config.n_iter,
        "n_power": config.n_power,
        "coeff": config.coeff,
        "solver": config.solver,
        "backward": config.backward,
        "rtol": config.rtol,
        "hidden_layers": config.hidden_layers,
        "hidden_solve": config.hidden_solve,
        "tied": config.tied,
        "norm": config.norm,
        "contraction": config.contraction,
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def build_model(config: TrainingConfig, data: ImageData) -> nn.Module:
    """Create the model with fresh weights, or those of `config.initial_checkpoint`.

    Raises:
        ValueError: The model does not exist, or does not take the arguments.
    """
    check_model_name(config.model)
    arguments = model_arguments(config, data)
    try:
        return timm.create_model(config.model, checkpoint_path=config.initial_checkpoint or None, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"cannot build {config.model} with {given}: {error}") from error


@torch.no_grad()
def catch_up_norms(model: nn.Module) -> None:
    """Let the power iterations of averaged weights, in eval mode, catch up with them.

    The average of singular vectors is neither of unit length nor of the averaged weight.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            module.train()
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, name)
            module.eval()
