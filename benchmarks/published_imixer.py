"""The published iMixer code, github.com/Toshihiro-Ota/imixer, under today's timm: something to measure against."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from timm import layers, models
from torch import nn


def load_published(path: str | Path) -> Callable[..., nn.Module]:
    """A function that makes the published model, by the names that timm and we have for its arguments.

    ``load_published(path)(n_iter=4, num_classes=10)`` is iMixer-S/16 for 224 pixels; every argument of timm's
    ``MlpMixer`` goes through. The checkout's blocks, spectral normalization and initialization are used as they are.
    Its modules get names of their own, and its models stay out of timm's registry, where they would replace ours.

    Args:
        path: The checkout.

    Raises:
        FileNotFoundError: There is none at the path.
    """
    path = Path(path)
    for file in ("utils/spectral_norm_fc.py", "models/mlp_imixer.py"):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{path} is no checkout of the published code: it has no {file}. "
                "Get it by: git clone https://github.com/Toshihiro-Ota/imixer"
            )
    # What the code imports from where timm had it in 2022; its package `utils` would import more of that timm.
    shims = {
        "timm.models.helpers": _module("timm.models.helpers", vars(models)),
        "timm.models.layers": _module("timm.models.layers", vars(layers)),
        "timm.models.registry": _module("timm.models.registry", {"register_model": lambda function: function}),
        "utils": _module("utils", {"__path__": []}),
        "utils.spectral_norm_fc": _loaded("published_spectral_norm_fc", path / "utils/spectral_norm_fc.py"),
    }
    with mock.patch.dict(sys.modules, shims):
        mlp_imixer = _loaded("published_mlp_imixer", path / "models/mlp_imixer.py")
    sys.modules[mlp_imixer.__name__] = mlp_imixer

    def published(*, h_ratio=2.0, n_iter=2, n_power=8, **mixer_args):
        return mlp_imixer.MlpMixer(hidden_ratio=h_ratio, n_repeat=n_iter, n_power_iterations=n_power, **mixer_args)

    return published


def _module(name: str, contents: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update({key: value for key, value in contents.items() if key != "__name__"})
    return module


def _loaded(name: str, file: Path) -> types.ModuleType:
    """The module, found by its name from now on: torch.compile looks for it."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
