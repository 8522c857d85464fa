"""Weights of a finished run as files that come with the package: half precision, a description, and a model card.

    python -m imixer.reproduction.release RUN --output imixer/weights
    python -m imixer.reproduction.release --check imixer_ti4_32 path/to/cifar10

The first command tests the rounded weights on the run's test images and writes that accuracy into the card. The second
tests what ``timm.create_model(..., pretrained=True)`` loads on the images of a folder, and compares it with the card.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

import imixer  # noqa: F401  registers the models
from imixer.data import ImageData, make_loader
from imixer.reproduction.data_sets import find_data_sets, is_cifar10
from imixer.reproduction.trial import replace_file
from imixer.shipped_weights import FOLDER
from imixer.training import TrainingConfig, evaluate, load_data
from imixer.validation import find_checkpoint, load_trained_model, read_run, settings_of

MAX_BYTES = 10 * 10**6
TOLERANCE = 0.05  # points of accuracy by which another machine's rounding may differ


@dataclass(frozen=True, kw_only=True)
class Release:
    """What was written.

    Args:
        weights: The file of the weights.
        top1: Test accuracy of the rounded weights, in percent.
        top1_before: That of the weights before they were rounded.
        num_bytes: Size of the file.
    """

    weights: Path
    top1: float
    top1_before: float
    num_bytes: int


def release(run_folder: Path, output: Path, *, data_dir: Path | None = None) -> Release:
    """Write the best weights of a run in half precision, with a description and a model card.

    Matrices and convolutions are rounded to float16; vectors, which are few, stay as they are: biases, norms, and the
    singular vectors of the spectral normalization.

    Args:
        run_folder: Folder of a training run, or one of its checkpoints.
        output: Folder to write to.
        data_dir: Folder of the images, if it is not where it was in the training.

    Raises:
        ValueError: The run is of a model that its name alone does not describe, or the file is too large.
    """
    checkpoint = find_checkpoint(run_folder)
    run = read_run(checkpoint)
    if run is None:
        raise ValueError(f"{checkpoint} does not say which run it is of; give the folder of a training run")
    config = settings_of(run, {"amp": False} | ({} if data_dir is None else {"data_dir": str(data_dir)}))
    data = load_data(config)
    model = load_trained_model(checkpoint, run, config, data).eval()
    rounded = {name: round_to_half(tensor) for name, tensor in model.state_dict().items()}
    before = accuracy(model, data, config)
    plain = timm.create_model(run["model"], num_classes=len(data.classes))
    check_same_model(model, plain, data, run["model"])
    plain.load_state_dict(rounded)
    after = accuracy(plain.eval(), data, config)

    name = run["model"]
    weights = output / f"{name}.safetensors"
    output.mkdir(parents=True, exist_ok=True)
    content = save(rounded, metadata={"format": "pt"})
    num_bytes = len(content)
    if num_bytes >= MAX_BYTES:
        raise ValueError(
            f"{name} has {num_bytes:,} bytes in half precision; what is shipped has less than {MAX_BYTES:,}"
        )
    replace_file(weights, content)
    usual = TrainingConfig()
    about = {
        "model": name,
        "data": "cifar10" if config.data_dir and is_cifar10(Path(config.data_dir)) else data.name,
        "classes": list(data.classes),
        "mean": list(run["mean"]),
        "std": list(run["std"]),
        "top1": after,
        "test_images": len(data.test),
        "settings": {
            key: value
            for key, value in run["config"].items()
            if key not in ("output", "data_dir", "model") and value != getattr(usual, key, None)
        },
        "epoch": run.get("epoch"),
    }
    replace_file(weights.with_suffix(".json"), json.dumps(about, indent=1).encode() + b"\n")
    found = Release(weights=weights, top1=after, top1_before=before, num_bytes=num_bytes)
    replace_file(weights.with_suffix(".md"), model_card(about, found).encode())
    return found


def check_same_model(trained: nn.Module, plain: nn.Module, data: ImageData, name: str) -> None:
    """Check that a model with default arguments computes what the trained one does.

    Raises:
        ValueError: It does not.
    """
    weights = trained.state_dict()
    shapes = {key: tensor.shape for key, tensor in plain.state_dict().items()}
    same = shapes == {key: tensor.shape for key, tensor in weights.items()}
    if same:
        plain.load_state_dict(weights)
        images = data.some_test_images(16)[0]
        with torch.no_grad():
            same = torch.equal(plain.eval()(images), trained(images))
    if not same:
        raise ValueError(
            f"the run's model is not what timm.create_model({name!r}) makes: it was trained with other arguments. "
            "Train one with the defaults of the name"
        )


def round_to_half(tensor: Tensor) -> Tensor:
    """A tensor as it is shipped."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() and tensor.dim() >= 2 else tensor.clone()


def accuracy(model: nn.Module, data: ImageData, config: TrainingConfig) -> float:
    """Test accuracy, in percent."""
    device = next(model.parameters()).device
    loader = make_loader(
        data.test, batch_size=config.batch_size, training=False, workers=config.workers, seed=0, device=device
    )
    return evaluate(model, loader).top1


def check(name: str, root: Path) -> tuple[float, float]:
    """Test shipped weights on the images of a folder.

    Args:
        name: Name of the model.
        root: Folder of the data set that it was trained on.

    Returns:
        The accuracy found, and that of the model card.

    Raises:
        ValueError: The model has no weights, or the images are another data set's.
    """
    description = FOLDER / f"{name}.json"
    if not description.is_file():
        raise ValueError(f"no weights of {name} come with this package")
    about = json.loads(description.read_text("utf-8"))
    source = next((data for data in find_data_sets(root) if data.name == about["data"]), None)
    if source is None:
        raise ValueError(f"{root} does not hold {about['data']}, which {name} was trained on")
    settings: dict[str, Any] = {**source.reading, "data_dir": source.data_dir, "model": name, "cache_mb": 512}
    config = TrainingConfig(**settings)
    data = load_data(config)
    data.test.mean, data.test.std = tuple(about["mean"]), tuple(about["std"])
    return accuracy(timm.create_model(name, pretrained=True).eval(), data, config), about["top1"]


def model_card(about: dict[str, Any], found: Release) -> str:
    """The card, in Markdown."""
    settings = "\n".join(f"{key}: {value}" for key, value in about["settings"].items())
    return f"""# {about["model"]}, trained on {about["data"]}

An iMixer (arXiv:2304.13061) for images of {len(about["classes"])} classes: {", ".join(about["classes"])}.

- Test accuracy: {found.top1:.2f}% top-1 on the {about["test_images"]:,} test images, with the weights in this file
  ({found.top1_before:.2f}% before they were rounded). The epoch was chosen by this accuracy, so that it is a little
  too high as an estimate for new images.
- Weights: {found.num_bytes:,} bytes of safetensors; matrices in float16, vectors in float32.
- Images in [0, 1] are normalized with mean {tuple(about["mean"])} and standard deviation {tuple(about["std"])}.
- Use: `timm.create_model("{about["model"]}", pretrained=True)`, after `import imixer`.
- Limits: trained on {about["data"]} alone; it has not been tested on any other images.
- License: Apache-2.0, as the code.

Settings of the training that are not the usual ones:

```yaml
{settings}
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Weights of a finished run as files that come with the package.")
    parser.add_argument("what", metavar="RUN | MODEL", help="folder of a run; with --check, the name of a model")
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of the images [the run's]")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="[%(default)s]")
    parser.add_argument("--check", action="store_true", help="test the shipped weights of a model instead")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            if options.data is None:
                raise ValueError("--check needs the folder of the images")
            found, stated = check(options.what, options.data)
            print(f"{options.what}: {found:.2f}% here, {stated:.2f}% on its model card")
            return 0 if abs(found - stated) <= TOLERANCE else 1
        made = release(Path(options.what), options.output, data_dir=options.data)
        print(f"{made.weights}: {made.num_bytes:,} bytes, {made.top1:.2f}% ({made.top1_before:.2f}% before rounding)")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
