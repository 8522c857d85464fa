"""Test a trained iMixer, or any other image classifier of timm, at several numbers of solver steps.

    python examples/train_imixer.py --epochs 5
    python examples/validate_imixer.py runs/digits-imixer_ti4_32

prints top-1 and top-5 accuracy, the accuracy of each class, and images per second, with one column for each number of
steps, in a few seconds. The confusion matrix and all numbers are left beside the checkpoint, in confusion.png and
validation.json. By default it tests on the images that the run was tested on.

An installed package has this as the command `imixer-validate`; the program is `imixer.validate_command`.
"""

import sys

from imixer_commands import validate

if __name__ == "__main__":
    sys.exit(validate())
