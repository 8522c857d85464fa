"""The command `imixer-validate`, which `examples/validate_imixer.py` runs as well."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from imixer.confusion_plot import plot_confusion
from imixer.data import LoaderError, make_loader
from imixer.imixer import IMixer
from imixer.training import load_data
from imixer.training.checkpoints import write_atomically
from imixer.training.command_line import path_text
from imixer.training.config import AMP_DTYPES, DEVICES
from imixer.training.distributed import choose_device
from imixer.validation import (
    find_checkpoint,
    format_validations,
    load_trained_model,
    read_run,
    settings_of,
    validate,
)
from solvers import ConvergenceWarning

EPILOG = """\
examples:
  %(prog)s runs/digits-imixer_ti4_32 --n_iter 1 2 4 8 16
      a run's best checkpoint, on the images that it was tested on
  %(prog)s runs/cifar10-imixer_s16_224 --solver anderson --rtol 1e-4 --n_iter 8 30 --amp
      solves that end when they have converged, in mixed precision
  %(prog)s published.pth.tar --model imixer_s16_224 --h_ratio 2 --dataset torch/cifar10 --data-dir path/to/cifar10
      weights alone, such as those of the published code: what the model is must be said
"""
N_ITERS = (1, 2, 4, 8)
CHANGES = ("data_dir", "dataset", "val_split", "img_size", "model", "h_ratio", "workers", "device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        checkpoint = find_checkpoint(options.checkpoint)
        run = read_run(checkpoint)
        if run is None and options.model is None:
            raise ValueError(f"{checkpoint} does not say which model it is of; give --model (and --h_ratio)")
        if run is not None and (options.model, options.h_ratio) != (None, None):
            raise ValueError(f"{checkpoint} says which model it is of; leave --model and --h_ratio out")
        changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
        config = settings_of(run, changes | {"amp": False})  # those are of the training
        data = load_data(config, progress=True)
        model = load_trained_model(checkpoint, run, config, data, use_ema=not options.no_ema)
        n_iters: list[int | None] = [None]
        unfit = [f"--{name}" for name in ("n_iter", "solver", "rtol") if getattr(options, name) is not None]
        if unfit and not isinstance(model, IMixer):
            raise ValueError(f"{config.model} has no solver, and takes no {', '.join(unfit)}; leave that out")
        if isinstance(model, IMixer):
            n_iters = list(options.n_iter or N_ITERS)
            if options.solver is not None:
                # The solver may be one that the backward mode of the training cannot go with.
                model.set_solver(solver=options.solver, backward="unrolled")
            if options.rtol is not None:
                model.set_solver(rtol=options.rtol)
        device = choose_device(config.device)
        amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
        loader = make_loader(
            data.test, batch_size=options.batch_size, training=False, workers=config.workers, seed=0, device=device
        )
        name = run["model"] if run else config.model
        print(f"{checkpoint}: {name}; {len(data.test):,} test images of {data.name}; {device}")
        batches = tqdm(loader, desc="testing", unit="batch", leave=False, disable=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows the residuals
            results = validate(
                model.to(device), batches, num_classes=len(data.classes), n_iters=n_iters, amp_dtype=amp_dtype
            )
        print(format_validations(results, data.classes))

        output = options.output or checkpoint.parent
        output.mkdir(parents=True, exist_ok=True)
        best = max(results, key=lambda result: result.top1)
        steps = "" if best.n_iter is None else f", solver steps {best.n_iter}"
        summary = {
            "checkpoint": str(checkpoint),
            "data": data.name,
            "images": len(data.test),
            "classes": data.classes,
            "solver": options.solver,
            "rtol": options.rtol,
            "precision": options.amp_dtype if options.amp else "float32",
            "device": str(device),
            "batch_size": options.batch_size,
            "results": [result.as_dict() for result in results],
        }
        write_atomically(output / "validation.json", (json.dumps(summary, indent=2) + "\n").encode())
        plot_confusion(
            best.confusion,
            data.classes,
            output / "confusion.png",
            title=f"{name} on {data.name}{steps}: {best.top1:.2f}%",
        )
        print(f"confusion   {output / 'confusion.png'}\nnumbers     {output / 'validation.json'}")
    except (ValueError, OSError, ImportError, LoaderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(
        description="Test a trained iMixer at several numbers of solver steps.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=path, metavar="RUN", help="a run's folder, or a checkpoint")
    solving = parser.add_argument_group("solving")
    solving.add_argument(
        "--n_iter", type=positive, nargs="+", metavar="N", help=f"solver steps [{' '.join(map(str, N_ITERS))}]"
    )
    solving.add_argument("--solver", metavar="NAME", help="fixed-point solver [the model's]")
    solving.add_argument("--rtol", type=float, metavar="TOL", help="relative tolerance that ends a solve early")

    data = parser.add_argument_group("data [the run's]")
    data.add_argument("--data-dir", type=path_text, metavar="DIR", help="folder of the images")
    data.add_argument("--dataset", metavar="NAME", help="timm's name of the data set, such as torch/cifar10")
    data.add_argument("--val-split", metavar="NAME", help="split to test on")
    data.add_argument("--workers", "-j", type=int, metavar="N", help="processes that read images")

    model = parser.add_argument_group("model, for a file of weights alone")
    model.add_argument("--model", metavar="NAME", help="name in timm's registry")
    model.add_argument("--h_ratio", type=float, metavar="R", help="inner width of the iMLP's map over its state's")
    model.add_argument("--img-size", type=positive, metavar="PX", help="side of the images [the model's]")

    computation = parser.add_argument_group("computation")
    computation.add_argument("--batch-size", "-b", type=positive, default=64, metavar="N", help="[%(default)s]")
    computation.add_argument("--device", choices=DEVICES, default="auto", help="where to compute; auto prefers CUDA")
    computation.add_argument("--amp", action="store_true", help="compute in mixed precision")
    computation.add_argument(
        "--amp-dtype", choices=list(AMP_DTYPES), default="bfloat16", help="its lower precision [%(default)s]"
    )
    computation.add_argument("--no-ema", action="store_true", help="test the weights, not their average")
    computation.add_argument("--output", type=path, metavar="DIR", help="folder for the results [the checkpoint's]")
    return parser


def path(text: str) -> Path:
    """Read a path that is not empty."""
    return Path(path_text(text))


def positive(text: str) -> int:
    """Read a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
