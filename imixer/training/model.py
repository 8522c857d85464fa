"""The model and the optimizer of a run: built from its settings and the images."""

import difflib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import imixer.imixer  # noqa: F401  registers the models
from imixer.checkpoint import load_checkpoint
from imixer.data import ImageData
from imixer.training.config import TrainingConfig, arguments_of_group
from imixer.training.keyword_arguments import plain
from imixer.training.step import make_optimizer, optimizer_class

# A keyword argument that no model takes.
_NOT_AN_ARGUMENT = "imixer_asks_what_the_model_takes"
# Arguments of `timm.create_model` that say where the first weights come from. A checkpoint brings the weights itself.
FIRST_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
# Arguments of timm's builder for something other than the whole classifier.
_OTHER_MODELS = ("features_only", "feature_cls", "pruned")
# Arguments that models of timm share, also those whose file does not name them.
_SHARED_ARGUMENTS = {"num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate"}


def check_model_name(name: str) -> None:
    """Raise a ValueError that lists what exists if timm knows no model, or no weights of it, of this name."""
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            model = name.partition(".")[0]
            known = ", ".join(timm.list_pretrained(f"{model}.*")[:8])
            raise ValueError(
                f"timm has no weights of the name {name!r}; give {model}{f', or one of {known}' if known else ''}"
            ) from error
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    imixers = ", ".join(timm.list_models("imixer*"))
    raise ValueError(f"unknown model {name!r}; {hint}the iMixers are {imixers}")


def refused_arguments(model: str, arguments: Mapping[str, Any]) -> set[str]:
    """Which of these keyword arguments of ``timm.create_model`` a model does not take, or sets itself.

    Each attempt includes one that no model takes. So Python refuses to call the constructor, and names an argument that
    the model does not take; nothing is built. A model that takes any argument is built, and takes them all.
    """
    refused: set[str] = set()
    while True:
        left = {name: value for name, value in arguments.items() if name not in refused}
        asked: dict[str, Any] = {**left, _NOT_AN_ARGUMENT: True}
        try:
            timm.create_model(model, **asked)
        except TypeError as error:
            complaint = str(error).partition("keyword argument")[2]  # unexpected, or given multiple values
            named = set(re.findall(r"'(\w+)'", re.split("did you mean", complaint, flags=re.IGNORECASE)[0]))
            if not named & left.keys():
                return refused
            refused |= named & left.keys()
        except Exception:  # a value that is not valid, which building the model will report
            return refused
        else:
            return refused


def settings_for_model(
    settings: dict[str, Any], *, explicit: Collection[str], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The settings without those that their model does not take, so that one preset serves several models.

    Args:
        settings: Values of fields of `TrainingConfig` by name.
        explicit: Names of the settings that must not be left out, because the user gave them for this model.
        say: Told what is left out.

    Raises:
        ValueError: The model does not exist, or does not take a setting that must not be left out.
    """
    model = settings.get("model", TrainingConfig.model)
    check_model_name(model)
    items = arguments_of_group("model")
    names = {argument: item.name for argument, item in items.items() if settings.get(item.name) is not None}
    names.pop("img_size", None)  # which says how large the images are in any case
    refused = refused_arguments(model, {argument: settings[name] for argument, name in names.items()})
    unfit = [name for argument, name in names.items() if argument in refused]
    wrong = [f"--{name.replace('_', '-')}" for name in unfit if name in explicit]
    if wrong:
        raise ValueError(f"{model} does not take {', '.join(wrong)}; leave that out, or choose another --model")
    if unfit:
        say(f"{model} does not take {', '.join(unfit)}: these settings of the preset or the file are left out")
    return {name: value for name, value in settings.items() if name not in unfit}


def model_arguments(config: TrainingConfig, data: ImageData) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that `config` sets or `data` demands, except `FIRST_WEIGHTS`."""
    arguments = {"num_classes": len(data.classes), "in_chans": data.in_chans} | config.model_arguments
    if config.data_dir is None and not config.dataset:
        # Digits are smaller than any model's own size, and its own patches would leave few tokens.
        arguments["img_size"] = data.img_size
        arguments.setdefault("patch_size", max(data.img_size // 4, 1))
    cfg = timm.get_pretrained_cfg(config.model)
    if cfg is not None and not cfg.fixed_input_size:  # takes images of any size, and does not ask for it
        arguments.pop("img_size", None)
        if config.patch_size is None:
            arguments.pop("patch_size", None)
    return {name: value for name, value in arguments.items() if name not in FIRST_WEIGHTS}


def check_model_arguments(source: Path | str, name: str, arguments: Mapping[str, Any]) -> None:
    """Check what a checkpoint says of its model before a model is built by it.

    `timm.create_model` also takes arguments that name files and addresses to load weights from. A checkpoint may give
    only plain values, and only for what the file that defines the model takes.

    Raises:
        ValueError: There is no such model, or an argument is of another kind.
    """
    check_model_name(name)
    for argument, value in arguments.items():
        if not _may_be_saved(name, argument, value):
            raise ValueError(
                f"{source} asks for {name} with {argument}={str(value)[:80]!r}, which is not taken from a checkpoint; "
                "give it yourself, by --model-kwargs or timm.create_model"
            )


def _may_be_saved(model: str, argument: str, value: Any) -> bool:
    """Whether a checkpoint may give this argument of a model."""
    try:
        plain(value, argument)
    except ValueError:
        return False
    return argument in _SHARED_ARGUMENTS | _taken_arguments(model)


def _taken_arguments(model: str) -> set[str]:
    """What the modules and builders in the file that defines a model take, except what is for creation only."""
    entrypoint = timm.model_entrypoint(model)
    file = [owner for owner in vars(sys.modules[entrypoint.__module__]).values() if callable(owner)]
    owners = [owner for owner in file if getattr(owner, "__module__", None) == entrypoint.__module__]
    owners += getattr(inspect.signature(entrypoint).return_annotation, "__mro__", ())  # from another file perhaps
    builders = [owner for owner in owners if inspect.isfunction(owner) and "pretrained" in _parameters(owner)]
    classes = [owner for owner in owners if inspect.isclass(owner)]
    modules = [owner for owner in classes if issubclass(owner, nn.Module) or is_dataclass(owner)]
    taken = {name for owner in (*builders, *modules) for name in _parameters(owner)}
    return taken - {*_parameters(timm.create_model), *_parameters(timm.models.build_model_with_cfg), *_OTHER_MODELS}


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(function).parameters


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


def create_model(config: TrainingConfig, data: ImageData, *, resumed: bool = False) -> nn.Module:
    """Create the model with the weights that it starts with.

    Args:
        config: The settings.
        data: The images.
        resumed: Whether other weights are loaded next, so that `FIRST_WEIGHTS` are not needed.

    Raises:
        ValueError: The model does not exist, or does not take the arguments, or could not be built again by them.
    """
    check_model_name(config.model)
    arguments = model_arguments(config, data)
    first = {} if resumed else {name: value for name, value in config.model_arguments.items() if name in FIRST_WEIGHTS}
    try:
        model = timm.create_model(config.model, **arguments, **first)
    except Exception as error:  # of any kind, since all values are passed on
        given, advice = _listed(arguments | first), config.advice("model")
        raise ValueError(f"cannot build {config.model} with {given}: {_reason(error)}{advice}") from error
    for name, value in (config.model_kwargs or {}).items():
        if name in arguments and not _may_be_saved(config.model, name, value):
            raise ValueError(
                f"model_kwargs sets {name} to {value!r}, which is not taken from a checkpoint, so that the run could "
                "be neither resumed nor validated; leave it out"
            )
    return model


@torch.no_grad()
def check_image_size(config: TrainingConfig, model: nn.Module, data: ImageData) -> None:
    """Show a new model an image of zeros, in eval mode: a size that it cannot take is an error before the training.

    Raises:
        ValueError: It cannot take the size of the images.
    """
    image = torch.zeros(1, data.in_chans, data.img_size, data.img_size, device=next(model.parameters()).device)
    try:
        with warnings.catch_warnings(action="ignore"):  # about solves of untrained weights
            model.eval()(image)
    except Exception as error:  # whatever a layer raises
        raise ValueError(
            f"{config.model} cannot take images of {data.img_size} x {data.img_size} pixels: {_reason(error)}; change "
            "--img-size, or choose another --model"
        ) from error
    model.train()


def build_optimizer(config: TrainingConfig, model: nn.Module, *, lr: float | None = None) -> torch.optim.Optimizer:
    """Create timm's optimizer for a model, with no weight decay for biases and other vectors.

    Args:
        config: The settings.
        model: The model that is trained.
        lr: The peak learning rate; None takes `config.lr`, or without it the optimizer's own.

    Raises:
        ValueError: The optimizer does not take the arguments.
    """
    arguments = {**config.optimizer_arguments, **({} if lr is None else {"lr": lr})}
    try:
        parameters = inspect.signature(optimizer_class(config.opt)).parameters
    except (AssertionError, ImportError) as error:
        raise ValueError(f"the optimizer {config.opt} cannot be used here: {error}") from error
    try:
        _check_optimizer_arguments(config, parameters)
        optimizer = make_optimizer(model, capturable=config.cuda_graph, **arguments)
    except Exception as error:  # of any kind, since all values are passed on
        raise ValueError(
            f"cannot make the optimizer {config.opt} with {_listed(arguments)}: {_reason(error)}; it takes "
            f"{', '.join(list(parameters)[1:])}{config.advice('optimization')}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"the optimizer {config.opt} takes second derivatives, which are not computed; choose another")
    for name, value in optimizer.defaults.items():
        if isinstance(value, torch.dtype):
            raise ValueError(
                f"the optimizer {config.opt} keeps {name}={value}, which PyTorch's state dicts of several processes "
                "cannot hold, so that the run could not be saved; choose another"
            )
    return optimizer


def _check_optimizer_arguments(config: TrainingConfig, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Check what optimizers notice in their first step only: the number of betas, and texts instead of numbers."""
    for name, parameter in parameters.items():
        value, default = config.optimizer_arguments.get(name), parameter.default
        if isinstance(value, str) and isinstance(default, (int, float)):
            raise ValueError(f"{name} must be {type(default).__name__}, not {value!r}")
        if isinstance(value, tuple) and isinstance(default, tuple) and len(value) != len(default):
            raise ValueError(f"{name} must be {len(default)} numbers, not {len(value)}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".strip()


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


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
