"""The command line: ``python -m implicit doctor --model NAME`` diagnoses the implicit layers of a model."""

import argparse
import difflib
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from implicit.diagnostics import diagnose
from implicit.diagnostics.page import html_page

# The keys under which checkpoints hold the weights.
_WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Formats of images. Decoders of others are not run, whatever a file is called: some of them start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if all layers are healthy, 1 if not, 2 if an argument or the model fails."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for name in options.imports:
            _imported(name)
        model, inputs = _model_and_inputs(options)
        if options.checkpoint is not None:
            model.load_state_dict(_weights(options.checkpoint))
        model.train(options.train)
        if options.images is not None:
            inputs = (_images(options.images, model, options.batch, options.shape),)
        elif not inputs:
            generator = torch.Generator().manual_seed(options.seed)
            inputs = (torch.randn(options.batch, *_shape(model, options.shape), generator=generator),)
        device = torch.device(options.device)
        model, inputs = model.to(device), tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
        diagnosis = diagnose(model, *inputs, seed=options.seed)
        print(diagnosis)
        if options.json is not None:
            options.json.write_text(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
        if options.html is not None:
            options.html.write_text(html_page(diagnosis, f"Diagnosis of {options.model}"), encoding="utf-8")
    except Exception as error:  # the code of the model may raise anything
        if options.traceback:
            traceback.print_exc()
        speaks = isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError)) and str(error)
        print(f"error: {error if speaks else _raised(error)}", file=sys.stderr)
        return 2
    return 0 if diagnosis.healthy else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m implicit", description="Tools for implicit layers.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="say why the solves of a model do not converge, and what to do",
        description="Run a model on a batch, diagnose every implicit layer and every call of fixed_point and root, and "
        "print the report. The exit status is 0 if all are healthy, 1 if one is not, and 2 if an argument is wrong or "
        "the model fails.",
    )
    add = doctor.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="a model of timm, or module:callable, where the callable takes no arguments and returns a model, or a "
        "tuple of a model and its inputs",
    )
    add("--import", dest="imports", action="append", default=[], metavar="MODULE", help="import it first, such as a "
        "package that registers models with timm; may be repeated")  # fmt: skip
    add("--checkpoint", type=Path, metavar="FILE", help="weights, a .safetensors or PyTorch file of tensors alone")
    add("--images", type=Path, metavar="DIR", help="a folder of images for the batch, by default random numbers")
    add("--batch", type=_positive, default=8, metavar="N", help="the number of samples (default: 8)")
    add("--shape", type=_sizes, metavar="C,H,W", help="the shape of a sample, by default the model's own")
    add("--train", action="store_true", help="diagnose in training mode instead of evaluation mode")
    add("--device", default="cpu", help="where to run (default: cpu)")
    add("--seed", type=int, default=0, help="for random inputs and directions (default: 0)")
    add("--html", type=Path, metavar="FILE", help="write the report with figures as one HTML page (needs matplotlib)")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--traceback", action="store_true", help="show where in the code an error was raised")
    return parser


def _raised(error: Exception) -> str:
    """The type of an error, what it says, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if frame.filename == __file__ else f"{frame.filename}, line {frame.lineno}; "
    return f"{type(error).__name__}: {error} ({place}--traceback shows the calls)"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _imported(name: str) -> Any:
    sys.path[:0] = [] if "" in sys.path or str(Path.cwd()) in sys.path else [""]
    return importlib.import_module(name)


def _model_and_inputs(options: argparse.Namespace) -> tuple[nn.Module, tuple[Any, ...]]:
    module, colon, name = options.model.partition(":")
    if not colon:
        return _model_of_timm(options.model), ()
    make = getattr(_imported(module), name, None)
    if not callable(make):
        raise ValueError(f"--model {options.model}: the module {module} has no callable {name!r}.")
    try:
        found = make()
    except Exception as error:
        raise RuntimeError(
            f"--model {options.model}: the callable, without arguments, raised {_raised(error)}"
        ) from error
    model, *inputs = found if isinstance(found, tuple) else (found,)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"--model {options.model}: the callable must return a torch.nn.Module, or a tuple of one and its inputs, "
            f"got {type(model).__name__}."
        )
    return model, tuple(inputs)


def _model_of_timm(name: str) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models()))
        raise ValueError(
            f"--model {name}: timm knows no such model{near and f', but {near}'}. Models of other packages are known "
            "when those are imported, such as by --import imixer; for a model of your own, give module:callable."
        )
    model: nn.Module = timm.create_model(name)
    return model


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("Models by name and images need timm: pip install timm.") from error
    return timm


def _weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # damaged files make the readers raise errors of any kind
        raise ValueError(
            f"{path} cannot be read: it is no checkpoint that holds only tensors, or it is damaged "
            f"({type(error).__name__}: {error})."
        ) from error
    if isinstance(found, dict):
        found = next((found[key] for key in _WEIGHTS if isinstance(found.get(key), dict)), found)
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict, at its top or under {', '.join(_WEIGHTS)}.")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _shape(model: nn.Module, given: tuple[int, ...] | None) -> tuple[int, ...]:
    config = getattr(model, "pretrained_cfg", None) or {}
    shape = given or config.get("input_size")
    if shape is None:
        raise ValueError(
            "The model does not say what shape its inputs have: give --shape, for example --shape 3,32,32."
        )
    return tuple(shape)


def _images(folder: Path, model: nn.Module, batch: int, shape: tuple[int, ...] | None) -> Tensor:
    """(B, C, H, W), the first images of a folder and the folders in it, as the model takes them."""
    timm = _timm()
    from PIL import Image

    kinds = {kind for kind, name in Image.registered_extensions().items() if name in _FORMATS}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)[:batch]
    if not files:
        raise ValueError(f"--images {folder}: there is no image in this folder.")
    config = timm.data.resolve_data_config({"input_size": _shape(model, shape)}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(Image.open(path, formats=_FORMATS).convert("RGB")) for path in files])


if __name__ == "__main__":
    sys.exit(main())
