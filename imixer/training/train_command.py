"""The command `imixer-train`, which `examples/train_imixer.py` runs as well."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence

import torch

from imixer.convergence import format_convergence, measure_convergence
from imixer.data import ImageData, LoaderError
from imixer.training.checkpoints import BEST, LAST, load_checkpoint
from imixer.training.command_line import parse
from imixer.training.distributed import join_slurm_step
from imixer.training.images import load_data
from imixer.training.imlp_report import iterates
from imixer.training.interruption import TrainingInterruptedError
from imixer.training.learner import NonFiniteError
from imixer.training.loop import TrainingResult, train

EPILOG = """\
examples:
  %(prog)s
      digits, with the defaults
  %(prog)s path/to/cifar10 --preset cifar10-small
      images laid out as path/to/cifar10/train/<class>/*.jpg and path/to/cifar10/test/<class>/*.jpg, a small model
  torchrun --nproc-per-node 4 --no-python imixer-train path/to/cifar10 --preset paper-small
      the paper's iMixer-S on CIFAR-10 as torchvision has it, on four GPUs
  %(prog)s --resume runs/cifar10-imixer_s16_224
      goes on where a run was stopped
  %(prog)s path/to/cifar10 --preset paper-small --output runs/paper --resume auto
      starts, or goes on where it was stopped: a command that a cluster may repeat
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    rank = 0
    try:
        join_slurm_step(os.environ)
        rank = int(os.environ.get("RANK", "0"))  # set by torchrun, accelerate launch or the line above
        if rank:
            warnings.simplefilter("ignore")  # the first process gives the same ones
        command = parse(arguments, epilog=EPILOG)
        saved = load_checkpoint(command.resume, lambda _: None)[0]["config"] if command.resume else None
        config = command.config(saved, say=print if rank == 0 else lambda _: None)
        data = load_data(config, progress=True)
        result = train(config, data, resume=command.resume, allow_other_data=command.allow_other_data)
        if rank == 0:
            report(result, data)
        leave()
    except TrainingInterruptedError as stopped:
        if rank == 0:
            print(stopped, file=sys.stderr)
        leave()
        return 128 + (stopped.signal_number or signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted; the run's folder keeps its last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, NonFiniteError, LoaderError) as error:
        print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
        return 2
    return 0


def leave() -> None:
    """End the group of processes, where all of them come to their end; after an error in one, the others still wait."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def report(result: TrainingResult, data: ImageData) -> None:
    """Print the test accuracy, the convergence of each iMLP on some test images, and where the files are."""
    last = result.metrics[-1]
    print(f"\ntest accuracy {last.test_top1:.2f}% after {last.epoch} epochs and {last.seconds:.0f} s")

    if iterates(result.model):
        device = next(result.model.parameters()).device
        images = data.some_test_images(64)[0].to(device)  # (B, C, H, W)
        print(f"\nfixed-point iteration of each iMLP on {len(images)} test images:")
        print(format_convergence(measure_convergence(result.model, images)))

    for what, name in (
        ("checkpoints", " and ".join(name for name in (BEST, LAST) if (result.output / name).exists())),
        ("curves", "curves.csv" + (" and tensorboard/" if (result.output / "tensorboard").exists() else "")),
        ("plot", "curves.png"),
        ("in short", "summary.json"),
    ):
        print(f"{what:<12}{result.output}/{name}")


if __name__ == "__main__":
    sys.exit(main())
