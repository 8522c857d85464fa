"""Checkpoints of the published iMixer code (Toshihiro-Ota/imixer) in this library's models.

The published code normalizes through a forward pre-hook, which names a layer's tensors ``weight_orig``, ``weight_u``,
``weight_v`` and ``weight_sigma``; here they belong to a parametrization. Every IMLP translates the names whenever a
state dict is loaded, so ``model.load_state_dict``, ``timm.create_model(checkpoint_path=...)`` and timm's scripts take
published files as they are. Give the model the ``h_ratio`` and ``n_iter`` that the checkpoint was trained with: the
number of steps is not in the file. Of a checkpoint of this library that holds for all that the iMLP takes.
"""

import os
import re
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

_PUBLISHED_NAMES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0.u",
    "weight_v": "parametrizations.weight.0.v",
    # The last sigma, kept for logging.
    "weight_sigma": None,
}

# A tensor of a layer inside the map of an iMLP.
_INNER_LAYER = re.compile(r"(?:^|\.)(?P<layer>(?:fc_sn|bn)\d+)\.")


def translate_published_keys(state_dict: MutableMapping[str, Any], prefix: str = "") -> None:
    """Rename the published code's keys to ours, in place; other keys stay as they are.

    Args:
        state_dict: Any state dict, published or not.
        prefix: Only keys that start so are looked at.
    """
    for key in list(state_dict):
        owner, _, name = key.rpartition(".")
        if name in _PUBLISHED_NAMES and key.startswith(prefix):
            value = state_dict.pop(key)
            ours = _PUBLISHED_NAMES[name]
            if ours is not None:
                state_dict[f"{owner}.{ours}"] = value


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, use_ema: bool = True) -> None:
    """Load a checkpoint file into an iMixer: this library's, timm's, or one of the published code.

    Reads what timm reads (``state_dict``, ``model``, EMA weights, safetensors) without running code from the file.

    Args:
        model: A model of the same architecture.
        path: The file.
        use_ema: Take averaged weights where the file has them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file's tensors do not fit the model; the message says which and, where the ratio differs, which
            ``h_ratio`` to use.
    """
    from timm.models import load_state_dict

    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file {os.fspath(path)!r}.")
    state_dict = load_state_dict(os.fspath(path), use_ema=use_ema)
    translate_published_keys(state_dict)
    ours = model.state_dict()
    for key in state_dict.keys() - ours.keys():
        if key.endswith((".parametrizations.weight.0.u", ".parametrizations.weight.0.v")):
            del state_dict[key]  # singular vectors, which certified norms do without
    _check_fit(ours, state_dict, os.fspath(path))
    model.load_state_dict(state_dict)


def _check_fit(ours: dict[str, Tensor], theirs: dict[str, Tensor], path: str) -> None:
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or unexpected:
        hint = ""
        if any(_INNER_LAYER.search(key) for key in ours) and any(_INNER_LAYER.search(key) for key in theirs):
            hint = " Create the model with the hidden_layers, the tied and the norm of the checkpoint."
        raise ValueError(
            f"The checkpoint {path!r} is of another model: it lacks {len(missing)} tensors ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}) and has {len(unexpected)} others ({', '.join(unexpected[:3])}"
            f"{', ...' if len(unexpected) > 3 else ''}).{hint}"
        )
    for key, tensor in ours.items():
        if tensor.shape != theirs[key].shape:
            hint = ""
            if inner := _INNER_LAYER.search(key):
                prefix = key[: inner.start("layer")]
                hint = f" The checkpoint has h_ratio={_h_ratio(theirs, prefix):g}: create the model with that."
            raise ValueError(
                f"The checkpoint {path!r} does not fit: {key} has shape {tuple(theirs[key].shape)} there and "
                f"{tuple(tensor.shape)} in the model.{hint}"
            )


def _h_ratio(state_dict: dict[str, Tensor], prefix: str) -> float:
    """That of the iMLP whose tensors have this prefix; whatever its norm, the first weight has (inner, ...)."""
    first = (t for key, t in state_dict.items() if key.startswith(f"{prefix}fc_sn1.") and t.dim() == 2)
    return next(first).shape[0] / state_dict[f"{prefix}fc1.weight"].shape[0]
