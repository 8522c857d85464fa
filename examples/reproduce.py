"""Run the experiments of the iMixer paper: its tables, its figures, and the ablation of solvers and backward modes.

    python examples/reproduce.py all --scale smoke

runs all of them at a tiny size on handwritten digits, in a minute or two, prints their tables and writes a page,
runs/reproduction-smoke/report.html. The command line is that of `imixer-reproduce`; docs/reproduction.md describes it.
"""

import os
import sys

# PyTorch's threads wait for each other in a busy loop. On cores that do other work too, that can make a step twenty
# times slower; a short loop costs little on idle ones. It has to be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

try:
    from imixer.reproduction.command_line import main
except ModuleNotFoundError as missing:
    if str(missing.name).partition(".")[0] in ("imixer", "implicit", "solvers"):
        raise
    print(f"error: {missing.name} is not installed; run: pip install 'implicit-layers[train]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
