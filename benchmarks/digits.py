"""Test accuracy on digits of the default training run over seeds, iMixer beside timm's Mixer of the same size.

python -m benchmarks.digits [--seeds 3] [--epochs 60]

The Mixer has the same blocks, width and patches; what differs is the token mixer. Each run is what `make train` does.
"""

import argparse
import os
import platform
import statistics
import tempfile

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import timm
import torch

import imixer.reproduction.mixers  # noqa: F401  registers timm's Mixer at this size
from imixer.training import PRESETS, TrainingConfig, load_data, train


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs a model, with seeds 0, 1, ... [%(default)s]")
    parser.add_argument("--epochs", type=int, default=PRESETS["digits"]["epochs"], help="epochs a run [%(default)s]")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )
    print(f"{'model':<14} {'seed':>6} {'top-1 %':>8} {'loss':>7} {'seconds':>8}", flush=True)
    for model in ("imixer_ti4_32", "mixer_ti4_32"):
        accuracies, times = [], []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                chosen = {"model": model, "seed": seed, "epochs": options.epochs, "output": folder}
                config = TrainingConfig(**{**PRESETS["digits"], **chosen})
                last = train(config, load_data(config), progress=False).metrics[-1]
            accuracies.append(last.test_top1)
            times.append(last.seconds)
            print(
                f"{model:<14} {seed:>6} {last.test_top1:>8.2f} {last.test_loss:>7.4f} {last.seconds:>8.0f}", flush=True
            )
        median = statistics.median(accuracies)
        print(f"{model:<14} {'median':>6} {median:>8.2f} {'':>7} {statistics.median(times):>8.0f}", flush=True)


if __name__ == "__main__":
    main()
