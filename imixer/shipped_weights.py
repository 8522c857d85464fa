"""Weights that come with the package, and what timm has to know of them.

Beside ``weights/<model>.safetensors`` lies ``weights/<model>.json``, with what the weights were trained on, and the
model card. :mod:`imixer.reproduction.release` writes all three.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"


def pretrained_cfgs(model: str, cfg: dict[str, Any], *, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """timm's entry for a model: with the file of its weights, if they come with the package.

    Args:
        model: Name of the model.
        cfg: The entry without weights.
        folder: Where the weights are.

    Returns:
        One entry, tagged with the name of the data set, or with ``untrained``, for which timm refuses
        ``pretrained=True``.
    """
    weights = folder / f"{model}.safetensors"
    if not weights.is_file():
        return {f"{model}.untrained": cfg}
    about = json.loads(weights.with_suffix(".json").read_text("utf-8"))
    trained = {
        "file": str(weights),
        "mean": tuple(about["mean"]),
        "std": tuple(about["std"]),
        "num_classes": len(about["classes"]),
        "label_names": tuple(about["classes"]),
        "description": f"top-1 {about['top1']:.2f}% on the test images of {about['data']}",
    }
    return {f"{model}.{about['data']}": cfg | trained}
