"""The device's results against the CPU's in float64: the same models, weights and images, the same problems."""

import copy
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.on_gpu.cells import Cell, WrongResultError
from benchmarks.on_gpu.setup import Setup
from benchmarks.on_gpu.steps import set_precision
from imixer import IMixer
from implicit import Implicit
from solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver, solve
from solvers.linear import GMRES
from solvers.testing import BANK, BankProblem

MODELS_TOLERANCE, SOLVERS_TOLERANCE = 1e-4, 1e-6
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 64, "num_classes": 10}
EXACT: dict[str, Any] = {"rtol": 1e-6, "n_iter": 100, "backward": Implicit(linear_solver=GMRES(rtol=1e-6))}
# Options of iMixer; None is the Mixer.
MODELS: dict[str, dict[str, Any] | None] = {
    "Mixer": None,
    "iMixer, 2 steps unrolled": {},
    "iMixer, 16 steps unrolled": {"n_iter": 16},
    "iMixer, 16 steps checkpointed": {"n_iter": 16, "backward": "checkpointed"},
    "iMixer, implicit to 1e-6": EXACT,
    "iMixer, implicit to 1e-6 by Anderson": {**EXACT, "solver": "anderson"},
    "iMixer, phantom": {"n_iter": 16, "backward": "phantom"},
    "iMixer, JFB": {"n_iter": 16, "backward": "jfb"},
    "iMixer, Neumann series": {"n_iter": 16, "backward": "neumann"},
    "iMixer, SHINE": {"n_iter": 4, "backward": "shine", "solver": "broyden"},
}
SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "newton-krylov": NewtonKrylov(),
    "auto": Auto(),
}
PROBLEMS = ("H-equation", "linear 0.5", "linear 0.9", "tanh", "imlp")


def moved(problem: BankProblem, device: torch.device) -> BankProblem:
    """The same problem on a device: the map with all that it closes over, the start and the solution."""
    f = problem.f
    assert isinstance(f, types.FunctionType)
    closed_over = inspect.getclosurevars(f).nonlocals
    cells = tuple(types.CellType(closed_over[name].to(device)) for name in f.__code__.co_freevars)
    there = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
    return BankProblem(there, problem.z0.to(device), problem.solution.to(device))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def check(errors: Mapping[str, float], tolerance: float) -> None:
    """Raise WrongResultError for an error above the tolerance, or none to compare."""
    for name, error in errors.items():
        if not error <= tolerance:
            raise WrongResultError(f"{name} off by {error:.1e}, which may be {tolerance:.0e}")


def model_errors(options: dict[str, Any] | None, setup: Setup) -> Mapping[str, float]:
    """Relative errors of logits, loss and all gradients together, in float32 without TF32."""
    set_precision("fp32")
    torch.manual_seed(0)
    model = MlpMixer(**SMALL) if options is None else IMixer(**SMALL, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initialization, at which most gradients are zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)

    def results(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        twin = copy.deepcopy(model).to(device, dtype)
        logits = twin(images.to(device, dtype))
        loss = F.cross_entropy(logits, targets.to(device))
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in twin.parameters() if parameter.grad is not None]
        return logits, loss, torch.cat(gradients)

    expected = results(torch.device("cpu"), torch.float64)
    names = ("logits", "loss", "gradients")
    errors = dict(zip(names, map(relative_error, results(setup.device, torch.float32), expected), strict=True))
    check(errors, MODELS_TOLERANCE)
    on_cpu = max(map(relative_error, results(torch.device("cpu"), torch.float32), expected))
    return {**errors, "the CPU's, at most": on_cpu}


def solver_errors(name: str, setup: Setup) -> Mapping[str, float]:
    """Relative error of each solver's solution in float64, solved to 1e-9."""
    problem = BANK[name](torch.float64)
    there = moved(problem, setup.device)
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 0, "max_steps": 500, "on_failure": "raise"}
    errors = {
        solver: relative_error(solve(there.f, there.z0, SOLVERS[solver], **options).value, problem.solution)
        for solver in SOLVERS
    }
    check(errors, SOLVERS_TOLERANCE)
    return errors


def cells(setup: Setup) -> list[Cell]:
    models = [
        Cell(
            section="correctness",
            table=f"Models against float64 on the CPU: relative errors in fp32, at most {MODELS_TOLERANCE:.0e}",
            labels={"model": name},
            run=functools.partial(model_errors, options, setup),
        )
        for name, options in MODELS.items()
    ]
    solvers = [
        Cell(
            section="correctness",
            table=f"Solvers in float64 to 1e-9: relative errors of the solution, at most {SOLVERS_TOLERANCE:.0e}",
            labels={"problem": name},
            run=functools.partial(solver_errors, name, setup),
        )
        for name in setup.some(PROBLEMS)
    ]
    return models + solvers
