"""The model of a run: built from its settings and the images."""

import difflib
import inspect
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import imixer.imixer  # noqa: F401  registers the models
from imixer.checkpoint import load_checkpoint
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


def check_model_arguments(source: Path, name: str, arguments: dict[str, Any]) -> None:
    """Check what a checkpoint says of its model before a model is built by it.

    `timm.create_model` also takes arguments that name files and addresses to load weights from. A checkpoint may give
    only plain values, and only for what the constructor of the model's class takes.

    Raises:
        ValueError: There is no such model, or an argument is of another kind.
    """
    check_model_name(name)
    kind = inspect.signature(timm.model_entrypoint(name)).return_annotation
    taken = {parameter for cls in getattr(kind, "__mro__", ()) for parameter in inspect.signature(cls).parameters}
    for argument, value in arguments.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if argument not in taken or not all(isinstance(entry, (int, float, str)) for entry in entries):
            raise ValueError(
                f"{source} asks for {name} with {argument}={str(value)[:80]!r}, which is not taken from a checkpoint; "
                "build the model yourself and load the weights with imixer.load_checkpoint"
            )


def build_model(config: TrainingConfig, data: ImageData) -> nn.Module:
    """Create the model with fresh weights, or those of `config.initial_checkpoint`.

    Raises:
        ValueError: The model does not exist, or does not take the arguments, or the checkpoint does not fit.
        OSError: The checkpoint cannot be read.
    """
    model = create_model(config, data)
    if config.initial_checkpoint:
        load_first_weights(model, config)
    return model


def create_model(config: TrainingConfig, data: ImageData) -> nn.Module:
    """Create the model with fresh weights.

    Raises:
        ValueError: The model does not exist, or does not take the arguments.
    """
    check_model_name(config.model)
    arguments = model_arguments(config, data)
    try:
        return timm.create_model(config.model, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"cannot build {config.model} with {given}: {error}") from error


def load_first_weights(model: nn.Module, config: TrainingConfig) -> str:
    """Load `config.initial_checkpoint`, and return one line that says so, and what was left out of it.

    Raises:
        ValueError: The checkpoint is damaged or does not fit.
        OSError: It cannot be read.
    """
    path = config.initial_checkpoint
    fresh = load_checkpoint(model, path, new_head=config.new_head, new_token_mixing=config.new_token_mixing)
    if not fresh:
        return f"the first weights are those of {path}"
    shown = ", ".join(fresh if len(fresh) <= 4 else [*fresh[:4], "..."])
    return f"the first weights are those of {path}, except {len(fresh)} tensors that start anew: {shown}"


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
