"""Small iMixers for the tests, and a file of weights that runs a command."""

import os
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import imixer  # noqa: F401  registers the models
from imixer import IMLP

SMALL = {"img_size": 16, "patch_size": 4, "num_blocks": 2, "embed_dim": 24, "num_classes": 5}


def small(**overrides):
    return timm.create_model("imixer_ti4_32", **{**SMALL, **overrides})


def trained_somewhat(model):
    """Weights away from their initialization: a non-zero head, normalization at work."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, IMLP) and module.norm == "spectral":
                for layer in module.normalized_layers:
                    layer.weight = 2 * layer.parametrizations.weight.original
    return model


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class Evil:
    """Unpickled, it runs a command that leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)
