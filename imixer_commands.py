"""The console commands `imixer-reproduce`, `imixer-train`, `imixer-validate`: what comes before PyTorch is imported."""

import importlib
import os
import sys
from collections.abc import Sequence

# PyTorch's threads wait for each other in a busy loop. On cores that do other work too, that can make a step twenty
# times slower; a short loop costs little on idle ones. It has to be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run experiments of the paper; return the exit code."""
    return _run("imixer.reproduction.command_line", arguments)


def train(arguments: Sequence[str] | None = None) -> int:
    """Train a model; return the exit code."""
    return _run("imixer.training.train_command", arguments)


def validate(arguments: Sequence[str] | None = None) -> int:
    """Test a trained model; return the exit code."""
    return _run("imixer.validate_command", arguments)


def _run(module: str, arguments: Sequence[str] | None) -> int:
    try:
        main = importlib.import_module(module).main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] in ("imixer", "implicit", "solvers"):
            raise
        command = "pip install 'implicit-layers[imixer,train]'"
        print(f"error: {missing.name} is not installed; run: {command}", file=sys.stderr)
        return 2
    return int(main(arguments))
