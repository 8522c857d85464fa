"""Checkpoints of the published iMixer code (Toshihiro-Ota/imixer) in this library's models.

The published code normalizes through a forward pre-hook, which names a layer's tensors ``weight_orig``, ``weight_u``,
``weight_v`` and ``weight_sigma``; here they belong to a parametrization. Every IMLP translates the names whenever a
state dict is loaded, so ``model.load_state_dict``, ``timm.create_model(checkpoint_path=...)`` and timm's scripts take
published files as they are. (timm's own loaders run code from a pickle in some versions; `load_checkpoint` never does.)
Give the model the ``h_ratio`` and ``n_iter`` that the checkpoint was trained with: the number of steps is not in the
file. A checkpoint of this library needs all of its options of the iMLP.
"""

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imixer.checkpoint_file import CheckpointError, read_file

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


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    use_ema: bool = True,
    new_head: bool = False,
    new_token_mixing: bool = False,
) -> list[str]:
    """Load a checkpoint file into an iMixer: this library's, timm's, or one of the published code.

    Reads what timm reads (``state_dict``, ``model``, EMA weights, safetensors) without running code from the file, and
    never follows a name or an address in it.

    To fine-tune on other classes or at another image size, create the model for them and say which part is to keep the
    weights that it was created with:

    - ``new_head``: the classifier;
    - ``new_token_mixing``: the token mixers, whose weights depend on the number of patches, that is on
      ``(img_size / patch_size) ** 2``. They hold much of what a Mixer has learned. A larger image with patches that
      are larger by the same factor has as many of them, but another patch embedding, which is never replaced.

    Args:
        model: A model of the same architecture.
        path: The file.
        use_ema: Take averaged weights where the file has them.
        new_head: Leave out the file's classifier.
        new_token_mixing: Leave out the file's token mixers.

    Returns:
        The names of the model's tensors that were left as they are, which are those of the parts asked for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its tensors do not fit the model; the message says which and, where the
            ratio, the classes or the patches differ, what to do.
    """
    path = Path(path)
    if not path.is_file():
        hint = ", which is a folder; give a file in it, such as best.pt" if path.is_dir() else ""
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}{hint}.")
    state_dict = _weights(path, use_ema)
    translate_published_keys(state_dict)
    ours = model.state_dict()
    kept = sorted(key for key in ours if (new_head and _in_head(model, key)) or (new_token_mixing and _mixes(key)))
    for key in list(state_dict):
        if (new_head and _in_head(model, key)) or (new_token_mixing and _mixes(key)):
            del state_dict[key]
        elif key.endswith((".parametrizations.weight.0.u", ".parametrizations.weight.0.v")) and key not in ours:
            del state_dict[key]  # singular vectors, which certified norms do without
    state_dict |= {key: ours[key] for key in kept}
    _check_fit(model, state_dict, str(path))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # tensors of a kind that cannot be copied
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The checkpoint {str(path)!r} does not fit: {reason}") from error
    return kept


def _weights(path: Path, use_ema: bool) -> dict[str, Tensor]:
    """The state dict in a file, wherever timm's and this library's scripts put it."""
    from timm.models import clean_state_dict

    content = read_file(path)
    averaged = ("state_dict_ema", "model_ema") if use_ema else ()
    for entry in (*averaged, "state_dict", "model"):
        if isinstance(content, dict) and content.get(entry) is not None:
            content = content[entry]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a model's weights by their names")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            found = f"{key!r:.60} is of type {type(value).__name__}"
            raise CheckpointError(f"{path} does not hold a model's weights by their names: {found}")
    weights: dict[str, Tensor] = clean_state_dict(content)
    return weights


def _in_head(model: nn.Module, key: str) -> bool:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier")
    if not names:
        raise ValueError(f"a {type(model).__name__} has no classifier that timm knows; leave new_head out")
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))


def _mixes(key: str) -> bool:
    return ".mlp_tokens." in key


def _check_fit(model: nn.Module, theirs: dict[str, Tensor], path: str) -> None:
    ours = model.state_dict()
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or unexpected:
        hint = ""
        if any(_INNER_LAYER.search(key) for key in ours) and any(_INNER_LAYER.search(key) for key in theirs):
            hint = " Create the model with the hidden_layers, the tied and the norm of the checkpoint."
        raise CheckpointError(
            f"The checkpoint {path!r} is of another model: it lacks {len(missing)} tensors ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}) and has {len(unexpected)} others ({', '.join(unexpected[:3])}"
            f"{', ...' if len(unexpected) > 3 else ''}).{hint}"
        )
    for key, tensor in ours.items():
        if tensor.shape != theirs[key].shape:
            raise CheckpointError(
                f"The checkpoint {path!r} does not fit: {key} has shape {tuple(theirs[key].shape)} there and "
                f"{tuple(tensor.shape)} in the model.{_advice(model, theirs, key)}"
            )


def _advice(model: nn.Module, theirs: dict[str, Tensor], key: str) -> str:
    """What to do about a tensor of another shape, as a sentence after a space; empty if there is nothing."""
    if _mixes(key) and key.endswith("fc1.weight") and not _INNER_LAYER.search(key):
        return (
            f" The checkpoint mixes {theirs[key].shape[1]} patches and the model {model.state_dict()[key].shape[1]}: "
            "create the model with the checkpoint's img_size and patch_size, or let the token mixers start anew with "
            "new_token_mixing=True (--new-token-mixing in training)."
        )
    if inner := _INNER_LAYER.search(key):
        return _h_ratio_advice(theirs, key[: inner.start("layer")])
    if getattr(model, "pretrained_cfg", None) and _in_head(model, key):
        return (
            f" The checkpoint tells {theirs[key].shape[0]} classes apart: test it on images of as many classes, or "
            "train a new classifier with new_head=True (--new-head in training)."
        )
    return ""


def _h_ratio_advice(theirs: dict[str, Tensor], prefix: str) -> str:
    """With that of the iMLP whose tensors have this prefix; whatever its norm, the first weight has (inner, ...)."""
    first = next((t for key, t in theirs.items() if key.startswith(f"{prefix}fc_sn1.") and t.dim() == 2), None)
    width = len(theirs[f"{prefix}fc1.weight"])
    if first is None or not width:
        return ""
    return f" The checkpoint has h_ratio={len(first) / width:g}: create the model with that."
