"""Train an iMixer, or any other image classifier of timm, on a folder of images or on scikit-learn's digits.

    python examples/train_imixer.py

trains on handwritten digits, which come with scikit-learn: about a minute on two CPU cores, for a test
accuracy near 99%. It prints the losses and the accuracy of each epoch, and in the end how far the
fixed-point iteration of each iMLP converged. The weights, the curves and their plot are left in runs/.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

# PyTorch's threads wait for each other in a busy loop. On cores that do other work too, that can make a step twenty
# times slower; a short loop costs little on idle ones. It has to be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

MODULES_OF_TRAIN_EXTRA = ("accelerate", "matplotlib", "sklearn", "timm", "torchvision", "tqdm")

try:
    import torch

    from imixer.convergence import format_convergence, measure_convergence
    from imixer.data import ImageData
    from imixer.imixer import IMixer
    from imixer.imlp import IMLP
    from imixer.training import NonFiniteLossError, TrainingResult, load_data, train
    from imixer.training_config import AMP_DTYPES, DEVICES, SCHEDULERS, TrainingConfig
except ModuleNotFoundError as missing:
    if missing.name not in MODULES_OF_TRAIN_EXTRA:
        raise
    print(f"error: {missing.name} is not installed; run: pip install 'implicit-layers[imixer,train]'", file=sys.stderr)
    sys.exit(2)

EPILOG = """\
examples:
  %(prog)s
      digits, with the defaults
  %(prog)s path/to/cifar10 --epochs 6
      images laid out as path/to/cifar10/train/<class>/*.jpg and path/to/cifar10/test/<class>/*.jpg; CIFAR-10 itself
      takes about seven minutes on two cores, and reaches 68%%
  %(prog)s path/to/images --model imixer_s16_224 --amp --batch-size 128 --h_ratio 2 --n_iter 2
      a model of the paper, in mixed precision
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = vars(build_parser().parse_args(arguments))
    try:
        config = TrainingConfig(**{field.name: options[field.name] for field in fields(TrainingConfig)})
        data = load_data(config, progress=True)
        result = train(config, data)
        report(result, data)
    except KeyboardInterrupt:
        print("interrupted: the run's folder keeps the epochs that were finished", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteLossError) as error:
        # An error from a worker process of the data loader carries its traceback; the last line counts.
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    return 0


def report(result: TrainingResult, data: ImageData) -> None:
    """Print the test accuracy, the convergence of each iMLP on some test images, and where the files are."""
    last = result.metrics[-1]
    print(f"\ntest accuracy {last.test_top1:.2f}% after {last.epoch} epochs and {last.seconds:.0f} s")

    if any(isinstance(module, IMLP) for module in result.model.modules()):
        device = next(result.model.parameters()).device
        num_test = len(data.test)
        chosen = range(0, num_test, -(-num_test // 64))  # evenly spaced: folders of images are sorted by class
        images = torch.stack([data.test[index][0] for index in chosen]).to(device)  # (B, C, H, W)
        print(f"\nfixed-point iteration of each iMLP on {len(images)} test images:")
        print(format_convergence(measure_convergence(result.model, images)))

    print(f"\ncheckpoint  {result.output / 'checkpoint.pt'}")
    print(f"curves      {result.output / 'curves.csv'}")
    print(f"plot        {result.output / 'curves.png'}")


def build_parser() -> argparse.ArgumentParser:
    """Define the options; each is a field of `TrainingConfig`, with its default."""
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(
        description="Train an iMixer on scikit-learn's digits, or on a folder of images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**{field.name: getattr(defaults, field.name) for field in fields(TrainingConfig)})

    data = parser.add_argument_group("data")
    data.add_argument(
        "data_dir",
        nargs="?",
        metavar="DATA_DIR",
        help="folder with train/ and test/ (or val/, validation/), each with one folder of images per class; "
        "without it, scikit-learn's digits",
    )
    data.add_argument(
        "--hflip", type=float, metavar="P", help="probability of mirroring a training image [%(default)s]"
    )
    data.add_argument("--no-aug", action="store_true", help="do not augment the training images")
    data.add_argument(
        "--cache-mb",
        type=int,
        metavar="MIB",
        help="decode all images once if they fit in this memory, else read them in every epoch [%(default)s]",
    )
    data.add_argument("--workers", type=int, metavar="N", help="processes that read images from disk [%(default)s]")

    model = parser.add_argument_group("model")
    own = {name: parameter.default for name, parameter in inspect.signature(IMixer).parameters.items()}
    model.add_argument("--model", metavar="NAME", help="name in timm's registry [%(default)s]")
    model.add_argument(
        "--img-size", type=int, metavar="PX", help="side of the images [digits: 8, else the model's own]"
    )
    model.add_argument("--patch-size", type=int, metavar="PX", help="side of a patch [digits: 2, else the model's own]")
    model.add_argument("--num-blocks", type=int, metavar="N", help="number of mixer blocks [the model's own]")
    model.add_argument("--embed-dim", type=int, metavar="N", help="channels of a token [the model's own]")
    model.add_argument(
        "--h_ratio", type=float, metavar="R", help=f"inner width of the iMLP's map over its state's [{own['h_ratio']}]"
    )
    model.add_argument(
        "--n_iter", type=int, metavar="N", help=f"fixed-point steps (at most, with --rtol) [{own['n_iter']}]"
    )
    model.add_argument(
        "--n_power", type=int, metavar="N", help=f"power iterations of the spectral normalization [{own['n_power']}]"
    )
    model.add_argument(
        "--coeff", type=float, metavar="C", help=f"bound on the spectral norm of the map's weights [{own['coeff']}]"
    )
    model.add_argument(
        "--solver", metavar="NAME", help=f"fixed-point solver: picard, anderson, broyden [{own['solver']}]"
    )
    model.add_argument(
        "--backward", metavar="NAME", help=f"gradients of the fixed point: unrolled, implicit [{own['backward']}]"
    )
    model.add_argument(
        "--rtol", type=float, metavar="TOL", help="relative tolerance that ends a solve early [no early end]"
    )
    model.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth rate [0]")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=int, metavar="N", help="passes over the training images [%(default)s]")
    optimization.add_argument("--batch-size", type=int, metavar="N", help="images per update [%(default)s]")
    optimization.add_argument("--opt", metavar="NAME", help="optimizer, by timm's name [%(default)s]")
    optimization.add_argument("--lr", type=float, help="peak learning rate [%(default)s]")
    optimization.add_argument("--weight-decay", type=float, metavar="W", help="weight decay [%(default)s]")
    optimization.add_argument(
        "--clip-grad", type=float, metavar="NORM", help="gradient clipping; 0: none [%(default)s]"
    )
    optimization.add_argument("--sched", choices=SCHEDULERS, help="learning rate schedule [%(default)s]")
    optimization.add_argument("--warmup-epochs", type=int, metavar="N", help="epochs of warm-up [%(default)s]")
    optimization.add_argument(
        "--warmup-lr", type=float, metavar="LR", help="learning rate it starts from [%(default)s]"
    )
    optimization.add_argument("--min-lr", type=float, metavar="LR", help="learning rate at the end [%(default)s]")
    optimization.add_argument("--smoothing", type=float, metavar="S", help="label smoothing [%(default)s]")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, metavar="N", help="seed of weights, order and augmentation [%(default)s]")
    run.add_argument("--device", choices=DEVICES, help="where to compute; auto prefers CUDA [%(default)s]")
    run.add_argument("--amp", action="store_true", help="compute in mixed precision")
    run.add_argument("--amp-dtype", choices=list(AMP_DTYPES), help="its lower precision [%(default)s]")
    run.add_argument("--output", metavar="DIR", help="folder for the results [runs/<data>-<model>]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
