"""Train an iMixer, or any other image classifier of timm, on a data set of images or on scikit-learn's digits.

    python examples/train_imixer.py

trains on handwritten digits, which come with scikit-learn: about a minute on two CPU cores, for a test accuracy near
99%. It shows the losses and the accuracy of each epoch, and in the end how far the fixed-point iteration of each iMLP
converged. Checkpoints, curves and their plot are left in runs/. Whatever stops it, --resume goes on from there.

Flags are those of timm's train.py, and of the paper's command; --help lists them. On several GPUs, or nodes:

    torchrun --nproc-per-node 4 examples/train_imixer.py path/to/cifar10 --preset paper-small
"""

import os
import signal
import sys
import warnings
from collections.abc import Sequence

# PyTorch's threads wait for each other in a busy loop. On cores that do other work too, that can make a step twenty
# times slower; a short loop costs little on idle ones. It has to be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

MODULES_OF_TRAIN_EXTRA = (
    "accelerate",
    "matplotlib",
    "psutil",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
    "yaml",
)
RANK = int(os.environ.get("RANK", "0"))  # set by torchrun and accelerate launch

try:
    import torch

    from imixer.convergence import format_convergence, measure_convergence
    from imixer.data import ImageData, LoaderError
    from imixer.training import (
        NonFiniteError,
        TrainingInterruptedError,
        TrainingResult,
        load_checkpoint,
        load_data,
        parse,
        train,
    )
    from imixer.training.imlp_report import iterates
except ModuleNotFoundError as missing:
    if missing.name not in MODULES_OF_TRAIN_EXTRA:
        raise
    print(f"error: {missing.name} is not installed; run: pip install 'implicit-layers[imixer,train]'", file=sys.stderr)
    sys.exit(2)

EPILOG = """\
examples:
  %(prog)s
      digits, with the defaults
  %(prog)s path/to/cifar10 --preset cifar10-small
      images laid out as path/to/cifar10/train/<class>/*.jpg and path/to/cifar10/test/<class>/*.jpg, a small model
  torchrun --nproc-per-node 4 %(prog)s path/to/cifar10 --preset paper-small
      the paper's iMixer-S on CIFAR-10 as torchvision has it, on four GPUs
  %(prog)s --resume runs/cifar10-imixer_s16_224
      goes on where a run was stopped
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if RANK:
        warnings.simplefilter("ignore")  # the first process gives the same ones
    try:
        command = parse(arguments, epilog=EPILOG)
        saved = load_checkpoint(command.resume, lambda _: None)[0]["config"] if command.resume else None
        config = command.config(saved, say=print if RANK == 0 else lambda _: None)
        data = load_data(config, progress=True)
        result = train(config, data, resume=command.resume)
        if RANK == 0:
            report(result, data, sharded=config.fsdp)
        leave()
    except TrainingInterruptedError as stopped:
        if RANK == 0:
            print(stopped, file=sys.stderr)
        leave()
        return 128 + (stopped.signal_number or signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted; the run's folder keeps its last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteError, LoaderError) as error:
        print(f"error: {error}" if RANK == 0 else f"error in process {RANK}: {error}", file=sys.stderr)
        return 2
    return 0


def leave() -> None:
    """End the group of processes, where all of them come to their end; after an error in one, the others still wait."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def report(result: TrainingResult, data: ImageData, *, sharded: bool) -> None:
    """Print the test accuracy, the convergence of each iMLP on some test images, and where the files are."""
    last = result.metrics[-1]
    print(f"\ntest accuracy {last.test_top1:.2f}% after {last.epoch} epochs and {last.seconds:.0f} s")

    if not sharded and iterates(result.model):
        device = next(result.model.parameters()).device
        images = data.some_test_images(64)[0].to(device)  # (B, C, H, W)
        print(f"\nfixed-point iteration of each iMLP on {len(images)} test images:")
        print(format_convergence(measure_convergence(result.model, images)))

    for what, name in (
        ("checkpoints", "best.pt and last.pt"),
        ("curves", "curves.csv and tensorboard/"),
        ("plot", "curves.png"),
        ("in short", "summary.json"),
    ):
        print(f"{what:<12}{result.output}/{name}")


if __name__ == "__main__":
    sys.exit(main())
