"""Run the experiments of the iMixer paper: its tables, its figures, and the ablation of solvers and backward modes.

    python examples/reproduce.py all --scale smoke

runs all of them at a tiny size on handwritten digits, in a minute or two, prints their tables and writes a page,
runs/reproduction-smoke/report.html. docs/reproduction.md describes the experiments, and how to share them between
machines.

An installed package has this as the command `imixer-reproduce`; the program is `imixer.reproduction.command_line`.
"""

import sys

from imixer_commands import reproduce

if __name__ == "__main__":
    sys.exit(reproduce())
