"""Training step and inference of iMixers, beside the published implementation's and timm's Mixer's.

python -m benchmarks.imixer [--published CHECKOUT] [--threads 2] [--repeats 7] [--models NAME ...] [--n-iter 1 2 4 8]

CHECKOUT is a clone of github.com/Toshihiro-Ota/imixer; nothing is installed from it, and without it its rows are left
out. "train" is the forward pass, the loss and the backward pass, without the optimizer's step, which is the same for
all; "infer" a forward pass in eval mode. Times are medians of runs in turns, and "/ p" is how many times faster than
the published code, the median over the turns. "MiB saved" is what is alive after the forward pass for the backward
pass; "peak" the most that is alive during the step, gradients with it; parameters are not counted, and compiled code
cannot be. Before it is measured, the unrolled model must give the logits of the published one for its weights.
"""

import argparse
import functools
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Started by its path, it would be imported in the place of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.imixer")

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import imixer  # noqa: F401  registers the models
from benchmarks import timing
from benchmarks.published_imixer import load_published
from solvers.testing import PeakMemory

BATCH = {"imixer_s16_224": 8, "imixer_ti4_32": 64, "imixer_s4_32": 64}
QUICK = {"img_size": 16, "num_blocks": 2, "embed_dim": 16}
CLASSES, H_RATIO, N_POWER = 10, 2.0, 8

# The published model, from its arguments.
Maker = Callable[..., nn.Module]


def variants(name, n_iter, size, published, compiled) -> dict[str, Any]:
    """What is compared, by the name of its row."""

    def ours(backward: str) -> nn.Module:
        options = {"h_ratio": H_RATIO, "n_power": N_POWER, "n_iter": n_iter, "backward": backward}
        return timm.create_model(name, num_classes=CLASSES, **options, **size)

    unrolled: Any = ours("unrolled")
    architecture: dict[str, Any] = {
        "img_size": unrolled.stem.img_size[0],
        "patch_size": unrolled.stem.patch_size[0],
        "num_blocks": len(unrolled.blocks),
        "embed_dim": unrolled.embed_dim,
    }
    found: dict[str, Any] = {}
    if published is not None:
        shared = {"h_ratio": H_RATIO, "n_power": N_POWER, "n_iter": n_iter, "num_classes": CLASSES}
        found["published"] = published(**shared, **architecture)
    found |= {"unrolled": unrolled, "JFB": ours("jfb"), "Implicit": ours("implicit")}
    found["timm's Mixer"] = timm.models.MlpMixer(num_classes=CLASSES, **architecture)
    for model in found.values():
        nn.init.normal_(model.head.weight, std=0.02)  # zero at first, which leaves all else without a gradient
    if compiled:
        found["unrolled, compiled"] = torch.compile(ours("unrolled"), dynamic=False)
    return found


def require_same(ours: nn.Module, published: nn.Module, images: Tensor) -> None:
    """Exit unless both give the same logits for the published model's weights."""
    ours.eval().load_state_dict(published.eval().state_dict())
    with torch.no_grad():
        theirs = published(images)
        error = float((ours(images) - theirs).norm() / theirs.norm())
    if not error < 1e-5:
        sys.exit(
            f"The logits differ from those of the published code by {error:.1e}, relatively: not the same mathematics."
        )


def step(model: nn.Module, images: Tensor, target: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(images), target).backward()


def memory(model: nn.Module, images: Tensor, target: Tensor) -> tuple[float, float]:
    """MiB after the forward pass and at most, of one training step."""
    model.zero_grad()
    with PeakMemory() as counted:
        loss = F.cross_entropy(model(images), target)
        saved = counted.held
        loss.backward()
    return saved / 2**20, counted.peak / 2**20


def table(name: str, n_iter: int, options: argparse.Namespace, published: Maker | None) -> None:
    """The rows of one model and number of steps."""
    models = variants(name, n_iter, QUICK if options.quick else {}, published, options.compile)
    side = models["unrolled"].stem.img_size[0]
    batch = 2 if options.quick else BATCH.get(name, 8)
    images, target = torch.randn(batch, 3, side, side), torch.randint(CLASSES, (batch,))
    if published is not None:
        require_same(models["unrolled"], models["published"], images)
    columns = []
    for training in (True, False):
        for model in models.values():
            model.train(training)
        with torch.set_grad_enabled(training):
            runs = [
                functools.partial(step, model, images, target) if training else functools.partial(model, images)
                for model in models.values()
            ]
            columns.append(timing.seconds(runs, options.repeats))
    for row, (label, model) in enumerate(models.items()):
        line = f"{name:<15}{n_iter:>7}  {label:<20}"
        for times in columns:
            line += f"{1e3 * statistics.median(times[row]):>10.1f}"
            if published is not None:
                line += f"{statistics.median(a / b for a, b in zip(times[0], times[row], strict=True)):>7.2f}"
        if "compiled" not in label:
            saved, peak = memory(model.train(), images, target)
            line += f"{saved:>11.2f}{peak:>9.2f}"
        print(line, flush=True)


def main() -> None:
    """Print everything."""
    parser = timing.parser(__doc__)
    parser.add_argument("--published", type=Path, metavar="CHECKOUT", help="a clone of Toshihiro-Ota/imixer")
    parser.add_argument("--models", nargs="+", default=[*BATCH], metavar="NAME", help="[%(default)s]")
    parser.add_argument("--n-iter", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="[%(default)s]")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out: minutes")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    try:
        published = None if options.published is None else load_published(options.published)
    except FileNotFoundError as error:
        parser.error(f"--published: {error}")
    timing.begin(options.threads, timm=timm.__version__)
    print()
    faster = "" if published is None else f"{'/ p':>7}"
    head = f"{'model':<15}{'n_iter':>7}  {'':<20}{'train ms':>10}{faster}{'infer ms':>10}{faster}"
    print(f"{head}{'MiB saved':>11}{'peak':>9}")
    for name in options.models:
        for n_iter in options.n_iter:
            torch.compiler.reset()
            table(name, n_iter, options, published)


if __name__ == "__main__":
    main()
