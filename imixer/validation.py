"""Testing a trained model, at several numbers of solver steps over the same images."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from imixer.checkpoint import load_checkpoint
from imixer.checkpoint_file import CheckpointError, read_file
from imixer.data import ImageBatch, ImageData
from imixer.imixer import IMixer
from imixer.training import TrainingConfig
from imixer.training.checkpoints import BEST, LAST
from imixer.training.command_line import saved_settings
from imixer.training.model import check_model_arguments, check_model_name, model_arguments
from implicit import record_solutions

RUN_KEYS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "model_args": dict,
    "classes": list,
    "mean": (list, tuple),
    "std": (list, tuple),
    "config": dict,
}


@dataclass(kw_only=True)
class Validation:
    """What one pass over the test images showed.

    Args:
        n_iter: Solver steps of each iMLP; None for a model without any.
        confusion: int64, (classes, classes): images of each class, by row, that were taken for each class, by column.
        loss: Mean cross-entropy.
        top5: Percentage of images whose class is among the five most likely.
        images_per_second: Images that the model takes in a second, without the time to read them.
        residual: Median relative residual of the solves on the first batch; None without iMLPs.
    """

    n_iter: int | None
    confusion: Tensor
    loss: float = 0.0
    top5: float = 0.0
    images_per_second: float = 0.0
    residual: float | None = None

    @property
    def top1(self) -> float:
        """Percentage of images whose class is the most likely one."""
        return 100 * self.confusion.trace().item() / self.confusion.sum().item()

    @property
    def class_accuracies(self) -> list[float | None]:
        """Percentage of right answers for each class; None for one without images."""
        rights, images = self.confusion.diagonal().tolist(), self.confusion.sum(dim=1).tolist()
        return [100 * right / count if count else None for right, count in zip(rights, images, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything in plain Python values, for JSON."""
        names = ("n_iter", "top1", "top5", "loss", "residual", "images_per_second")
        numbers = {name: getattr(self, name) for name in names}
        return numbers | {"class_accuracies": self.class_accuracies, "confusion": self.confusion.tolist()}


def read_run(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint says of its run: its `RUN_KEYS`; None for one of weights alone, as published ones are.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, or no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; give a run's folder, its {BEST} or its {LAST}")
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a model's weights by their names")
    if not all(key in checkpoint for key in RUN_KEYS):
        return None
    run = {key: checkpoint[key] for key in (*RUN_KEYS, "epoch") if key in checkpoint}
    unfit = [key for key, kind in RUN_KEYS.items() if not isinstance(run[key], kind)]
    if not unfit:
        unfit = [key for key in ("mean", "std") if not all(isinstance(value, (int, float)) for value in run[key])]
    if unfit:
        raise CheckpointError(f"{path} is no checkpoint of a training run: {unfit[0]} is {str(run[unfit[0]])[:80]!r}")
    return run


def find_checkpoint(path: Path) -> Path:
    """Return the best checkpoint of a run's folder, or else its last one; a file as it is."""
    if not path.is_dir():
        return path
    return next((path / name for name in (BEST, LAST) if (path / name).is_file()), path / LAST)


def settings_of(run: dict[str, Any] | None, changes: dict[str, Any]) -> TrainingConfig:
    """Return the settings of a run, or the defaults, with `changes`; settings that are no longer known are left out.

    The size of the images is that of the run's model.

    Raises:
        ValueError: A value is unfit.
    """
    settings = saved_settings(run["config"] if run else {})
    size = run["model_args"].get("img_size") if run else None
    if isinstance(size, int):
        settings["img_size"] = size
    return TrainingConfig(**(settings | changes))


def load_trained_model(
    path: Path, run: dict[str, Any] | None, config: TrainingConfig, data: ImageData, *, use_ema: bool = True
) -> nn.Module:
    """Build the model of a checkpoint, and prepare the test images as they were in its training.

    Args:
        path: The checkpoint.
        run: What `read_run` found in it.
        config: The settings; the model's are taken from here if `run` is None.
        data: The images to test on; they take on the mean and the standard deviation of the run's.
        use_ema: Take averaged weights where the file has them.

    Raises:
        ValueError: The checkpoint names no model that it may, the weights do not fit, or the run's classes or image
            size are others than the images'.
    """
    if run is None:
        check_model_name(config.model)
        name, arguments = config.model, model_arguments(config, data)
    else:
        name, arguments = run["model"], run["model_args"]
        check_model_arguments(path, name, arguments)
        if tuple(run["classes"]) != data.classes:
            there, here = run["classes"], data.classes
            raise ValueError(
                f"{path} tells {len(there)} classes apart ({', '.join(map(str, there[:4]))} ...), and {data.name} has "
                f"{len(here)} ({', '.join(here[:4])} ...); test on images of the same"
            )
        data.test.mean, data.test.std = tuple(run["mean"]), tuple(run["std"])
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except Exception as error:  # the arguments may be those of a file
        raise ValueError(f"cannot build the {name} of {path}: {' '.join(str(error).split())}") from error
    size = _image_size(name, arguments)
    if size not in (None, data.img_size):
        raise ValueError(
            f"the {name} of {path} takes images of {size} x {size} pixels, not {data.img_size} x {data.img_size}; "
            "leave --img-size out"
        )
    load_checkpoint(model, path, use_ema=use_ema)
    return model


def _image_size(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Height and width of the images that a model takes; None if it takes several."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.fixed_input_size or arguments.get("dynamic_img_size"):
        return None
    size: int = arguments.get("img_size", cfg.input_size[-1])
    return size


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Iterable[ImageBatch],
    *,
    num_classes: int,
    n_iters: Sequence[int | None] = (None,),
    amp_dtype: torch.dtype | None = None,
) -> list[Validation]:
    """Test a model at several numbers of solver steps, reading each image once.

    Args:
        model: A classifier, which is left in eval mode, with the last of `n_iters`.
        loader: The test images, on any device.
        num_classes: Number of classes.
        n_iters: Steps of each iMLP; None leaves them as they are.
        amp_dtype: Lower precision of mixed precision; None is the model's own.

    Returns:
        One result for each of `n_iters`.

    Raises:
        ValueError: There are no images, or steps for a model that is no iMixer.
    """
    if not isinstance(model, IMixer) and any(n_iter is not None for n_iter in n_iters):
        raise ValueError(f"a {type(model).__name__} takes no solver steps, which are an iMixer's; leave n_iter out")
    model.eval()
    device = next(model.parameters()).device
    autocast: AbstractContextManager[object] = nullcontext()
    if amp_dtype is not None:
        autocast = torch.autocast(device.type, dtype=amp_dtype)
    tallies = [_Tally(n_iter, num_classes, device) for n_iter in n_iters]
    num_batches = 0
    with autocast:
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            for tally in tallies:
                if isinstance(model, IMixer) and tally.n_iter is not None:
                    model.set_solver(n_iter=tally.n_iter)
                if not num_batches:
                    # The first call takes longer anyway: memory, tuning.
                    with record_solutions(model) as record:
                        model(images)
                    solutions = [solution for solves in record.values() for solution in solves]
                    residuals = [solution.residual for solution in solutions if solution.residual is not None]
                    tally.residual = torch.cat(residuals).median().item() if residuals else None
                started = _time(device)
                logits = model(images)  # (B, classes)
                tally.seconds += _time(device) - started
                tally.count(logits.float(), targets)
            num_batches += 1
    if not num_batches:
        raise ValueError("there are no images to test on")
    return [tally.result() for tally in tallies]


@dataclass
class _Tally:
    """Sums over the images so far, on the model's device."""

    n_iter: int | None
    num_classes: int
    device: torch.device
    seconds: float = 0.0
    residual: float | None = None
    sums: Tensor = field(init=False)  # loss, top-5
    confusion: Tensor = field(init=False)  # flat, (classes * classes,)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.confusion = torch.zeros(self.num_classes**2, dtype=torch.int64, device=self.device)

    def count(self, logits: Tensor, targets: Tensor) -> None:
        likeliest = logits.topk(min(5, self.num_classes)).indices  # (B, 5)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        self.sums += torch.stack([loss, (likeliest == targets[:, None]).sum()])
        self.confusion += torch.bincount(targets * self.num_classes + likeliest[:, 0], minlength=self.num_classes**2)

    def result(self) -> Validation:
        confusion = self.confusion.view(self.num_classes, self.num_classes).cpu()
        num_images = int(confusion.sum())
        loss, top5 = (self.sums / num_images).tolist()
        return Validation(
            n_iter=self.n_iter,
            confusion=confusion,
            loss=loss,
            top5=100 * top5,
            images_per_second=num_images / self.seconds,
            residual=self.residual,
        )


def _time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def format_validations(results: Sequence[Validation], classes: Sequence[str], *, most_classes: int = 20) -> str:
    """Return a table with one column for each result; of many classes, those that are recognized worst.

    Args:
        results: What `validate` returned.
        classes: Names of the classes.
        most_classes: Largest number of them to list.
    """
    accuracies = [result.class_accuracies for result in results]
    shown: Sequence[int] = range(len(classes))
    if len(classes) > most_classes:
        tested = [(accuracy, index) for index, accuracy in enumerate(accuracies[-1]) if accuracy is not None]
        shown = [index for _, index in sorted(tested)[:most_classes]]
    rows = [
        ("solver steps", ["own" if result.n_iter is None else str(result.n_iter) for result in results]),
        ("top-1 %", [f"{result.top1:.2f}" for result in results]),
        ("top-5 %", [f"{result.top5:.2f}" for result in results]),
        ("cross-entropy", [f"{result.loss:.4f}" for result in results]),
        ("median residual", ["-" if result.residual is None else f"{result.residual:.1e}" for result in results]),
        ("images/s", [f"{result.images_per_second:,.0f}" for result in results]),
    ]
    for index in shown:
        values = [column[index] for column in accuracies]
        rows.append((f"class {classes[index]} %", ["-" if value is None else f"{value:.2f}" for value in values]))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}" + "".join(f"{value:>11}" for value in values) for label, values in rows]
    if len(classes) > most_classes:
        lines.append(f"({len(shown)} of {len(classes)} classes, those with the lowest accuracy in the last column)")
    return "\n".join(lines)
