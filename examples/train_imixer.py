"""Train an iMixer, or any other image classifier of timm, on a data set of images or on scikit-learn's digits.

    python examples/train_imixer.py

trains on handwritten digits, which come with scikit-learn: about a minute on two CPU cores, for a test accuracy near
99%. It shows the losses and the accuracy of each epoch, and in the end how far the fixed-point iteration of each iMLP
converged. Checkpoints, curves and their plot are left in runs/. Whatever stops it, --resume goes on from there.

Flags are those of timm's train.py, and of the paper's command; --help lists them. On several GPUs, or nodes:

    torchrun --nproc-per-node 4 examples/train_imixer.py path/to/cifar10 --preset paper-small

An installed package has this as the command `imixer-train`; the program is `imixer.training.train_command`.
"""

import sys

from imixer_commands import train

if __name__ == "__main__":
    sys.exit(train())
