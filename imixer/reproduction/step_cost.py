"""The costs of a training step, and how near its gradient is to the exact one of the fixed point."""

import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imixer.checkpoint import load_checkpoint
from imixer.convergence import implicit_imlps
from imixer.data import ImageData
from imixer.imixer import IMixer
from imixer.training import TrainingConfig, build_model
from implicit import SHINE, Implicit, record_solutions
from solvers.linear import GMRES

BATCH = 64
REPEATS = 5
EXACT_RTOL = 1e-8


def measure_steps(config: TrainingConfig, data: ImageData, folder: Path) -> list[dict[str, Any]]:
    """One row before the training, at the last checkpoint but one, and after the training.

    Args:
        config: Settings of the run.
        data: Its images.
        folder: Its folder.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, data)
    assert isinstance(model, IMixer)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    images, targets = (tensor.to(device) for tensor in training_batch(data))
    rows = []
    for point, name in (("before", None), ("during", "previous.pt"), ("after", "last.pt")):
        if name is not None:
            if not (folder / name).is_file():
                continue  # a run of one save
            load_checkpoint(model, folder / name)
        rows.append({"point": point, **measure_step(model.to(device), images, targets)})
    return rows


def training_batch(data: ImageData) -> tuple[Tensor, Tensor]:
    """Training images, evenly spaced since folders are sorted by class, and their targets."""
    indices = range(0, len(data.train), max(len(data.train) // BATCH, 1))[:BATCH]
    images, targets = zip(*(data.train[index] for index in indices), strict=True)
    return torch.stack(images), torch.stack(targets)


def measure_step(model: IMixer, images: Tensor, targets: Tensor) -> dict[str, float | None]:
    """Costs of one step forward and backward on a batch, and the quality of its gradient.

    - ``seconds``: the median of a few steps; on a CPU, of the time that its cores work for this process, which other
      trials beside it leave alone;
    - ``calls``: calls of the maps of all layers, forward and backward;
    - ``products``: steps of the linear solves of the backward pass, of all layers; 0 where there is none;
    - ``bytes_saved``: what the forward pass keeps for the backward pass, without weights and images;
    - ``cosine``: of the gradient to the exact one; ``exact_converged``: share of the rows whose solve for it converged.

    Args:
        model: The model, whose weights and power iterations are left alone.
        images: (B, C, H, W).
        targets: (B,) their classes.
    """
    model.eval()  # power iterations stand still, so that every gradient is of the same weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solves that end at their largest number of steps are part of the picture
        found, seconds = None, []
        for _ in range(REPEATS):
            started = _now(images)
            found = gradient(model, images, targets)
            seconds.append(_now(images) - started)
        assert found is not None
        with counted_calls(model) as calls:
            gradient(model, images, targets)
        saved = saved_bytes(model, images, targets)
        with record_solutions(model) as record:
            gradient(model, images, targets)
        solutions = [solution for solves in record.values() for solution in solves]
        adjoints = [solution.adjoint for solution in solutions if solution.adjoint is not None]
        exact, converged = exact_gradient(model, images, targets)
    return {
        "seconds": statistics.median(seconds),
        "calls": calls["calls"],
        "products": sum(adjoint.num_evals for adjoint in adjoints),
        "bytes_saved": saved,
        "cosine": float(nn.functional.cosine_similarity(found.double(), exact, dim=0)),
        "exact_converged": converged,
    }


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy to all parameters, as one vector."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = nn.functional.cross_entropy(model(images), targets)
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if part is None else part).flatten()
            for parameter, part in zip(parameters, parts, strict=True)
        ]
    )


def exact_gradient(model: IMixer, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """The gradient of the loss at the fixed points, in float64, and the share of rows whose solve converged."""
    exact = copy.deepcopy(model).double()
    exact.set_solver(
        solver="anderson", rtol=EXACT_RTOL, n_iter=500, backward=Implicit(linear_solver=GMRES(rtol=EXACT_RTOL))
    )
    with record_solutions(exact) as record:
        found = gradient(exact, images.double(), targets)
    converged = torch.cat([solution.converged for solves in record.values() for solution in solves])
    return found, float(converged.double().mean())


@contextlib.contextmanager
def counted_calls(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, ``calls`` counts the calls of the maps of all iMLPs."""
    counts = {"calls": 0}

    def count(*_: object) -> None:
        counts["calls"] += 1

    maps = [layer.f for _, layer in implicit_imlps(model).values()]
    hooks = [f.register_forward_pre_hook(count) for f in maps if isinstance(f, nn.Module)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def saved_bytes(model: nn.Module, images: Tensor, targets: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, without weights and images."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), images)}
    kept: list[Tensor] = []  # so that no storage is freed, and its address used again, while it is counted

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    shines = any(isinstance(layer.backward, SHINE) for _, layer in implicit_imlps(model).values())
    observed: contextlib.AbstractContextManager[dict[str, list[Any]]] = (
        record_solutions(model) if shines else contextlib.nullcontext({})
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), observed as record:
        nn.functional.cross_entropy(model(images), targets)
    for solution in (solution for solves in record.values() for solution in solves):
        kept += [solution.state.inverse.u, solution.state.inverse.v]  # SHINE's, which autograd does not know of
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in sizes.items() if address not in apart)


def _now(images: Tensor) -> float:
    if not images.is_cuda:
        return time.process_time()
    torch.cuda.synchronize(images.device)
    return time.perf_counter()
