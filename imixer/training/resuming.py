"""Whether a run can go on from a checkpoint, and what is not as it was."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from imixer.data import ImageData
from imixer.training.checkpoints import CheckpointError
from imixer.training.config import TrainingConfig
from imixer.training.model import model_arguments


def identity(config: TrainingConfig, data: ImageData, world_size: int) -> dict[str, Any]:
    """What a run cannot change: its model, its images, how many of them make an update, and what an optimizer keeps."""
    return {
        "model": config.model,
        "model_args": model_arguments(config, data),
        "classes": list(data.classes),
        "training_images": len(data.train),
        "global_batch": config.batch_size * world_size,
        "grad_accum_steps": config.grad_accum_steps,
        "opt": config.opt,
        "opt_kwargs": config.opt_kwargs,
        "layer_decay": config.layer_decay,
    }


def check_same_run(source: Path, checkpoint: dict[str, Any], here: dict[str, Any], world_size: int) -> None:
    """Check that a checkpoint is of the run that `identity` describes.

    Raises:
        CheckpointError: It is of another one; the message says what differs.
    """
    differing = [name for name, value in here.items() if checkpoint.get(name) != value]
    if not differing:
        return
    if differing == ["global_batch"]:
        batch, rest = divmod(checkpoint["global_batch"], world_size)
        advice = f"--batch-size {batch}" if not rest else "another number of processes"
        raise CheckpointError(
            f"{source} is of a run with {checkpoint['global_batch']} images to a step of all processes together, which "
            f"here would be {here['global_batch']}; to continue it with {world_size} processes, give {advice}"
        )
    there = ", ".join(f"{name} {_short(checkpoint.get(name))} there, {_short(here[name])} here" for name in differing)
    raise CheckpointError(f"{source} is of another run: {there}")


def describe_changes(checkpoint: dict[str, Any], config: TrainingConfig) -> str:
    """The settings that are not those of the run so far, as the end of a sentence."""
    changes = [
        f"{name} {checkpoint['config'].get(name)!r} -> {value!r}"
        for name, value in asdict(config).items()
        if name != "output" and checkpoint["config"].get(name) != value
    ]
    return f", with {', '.join(changes)}" if changes else ""


def _short(value: Any) -> str:
    text = ", ".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
