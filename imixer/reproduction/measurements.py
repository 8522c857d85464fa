"""What is measured on a trained model besides its accuracy. Every result is made of plain values, for a JSON file."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imixer.certificate import certify
from imixer.convergence import ObservedSolve, evaluating, observe_solves
from imixer.data import ImageData, make_loader
from imixer.imixer import IMixer
from imixer.reproduction.step_cost import measure_steps
from imixer.training import TrainingConfig, evaluate

IMAGES = 16  # test images that iterations are looked at on
LAST_STEP = 16  # the largest k of the figures
FIXED_POINT = {"solver": "anderson", "rtol": 1e-5, "n_iter": 100, "backward": "unrolled"}


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished training run.

    Args:
        model: The trained model, in evaluation mode. Measurements leave its weights alone, and may change its solver.
        data: The images.
        config: The settings.
        folder: The run's folder, with its checkpoints.
        test_steps: Numbers of steps to test with.
    """

    model: nn.Module
    data: ImageData
    config: TrainingConfig
    folder: Path
    test_steps: tuple[int, ...]

    def test_images(self, count: int) -> Tensor:
        """(B, C, H, W) test images on the model's device."""
        return self.data.some_test_images(count)[0].to(next(self.model.parameters()).device)


def states_of(solve: ObservedSolve, count: int) -> list[Tensor]:
    """The states z(0), ..., z(count) of plain iteration from the model's start, each (rows, D)."""
    states = [solve.layer.start(*solve.inputs)]
    while len(states) <= count:
        states.append(solve.layer.f(states[-1], *solve.inputs))
    return states


def iteration(run: TrainedRun) -> dict[str, Any]:
    """The curves of Figure 3 for every layer: norms of steps over D, and cosines of consecutive states, against k.

    Both are means over rows, which are images times channels.
    """
    layers = {}
    with evaluating(run.model):
        for name, solve in observe_solves(run.model, run.test_images(IMAGES)).items():
            states = states_of(solve, LAST_STEP)
            pairs = list(itertools.pairwise(states))
            steps = torch.stack([(after - before).norm(dim=1).mean() for before, after in pairs]) / states[0].shape[1]
            cosines = torch.stack([F.cosine_similarity(before, after, dim=1).mean() for before, after in pairs])
            layers[name] = {"step": steps.tolist(), "cosine": cosines.tolist()}
    return {"layers": layers}


def feature_maps(run: TrainedRun) -> dict[str, Any]:
    """Pictures of what the first block's token mixer returns after k steps, for the channels that vary most.

    ``images`` has for each of two test images its pixels; ``maps`` for each of these, each channel and each k of
    ``steps`` a picture of the tokens.
    """
    steps, channels = (0, 1, 2, 4, LAST_STEP), 4
    images = run.test_images(2)
    with evaluating(run.model):
        _, solve = next(iter(observe_solves(run.model, images).items()))
        states = states_of(solve, LAST_STEP)
        outputs = [solve.imlp.fc2(solve.imlp.act(states[k])) for k in steps]  # (images * channels, tokens)
    size = round(outputs[0].shape[1] ** 0.5)
    maps = torch.stack(outputs).view(len(steps), len(images), -1, size, size)  # (k, images, channels, size, size)
    chosen = maps[-1].flatten(2).std(dim=2).mean(dim=0).topk(channels).indices
    pixels = images.movedim(1, -1)
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    return {
        "steps": list(steps),
        "channels": chosen.tolist(),
        "images": _rounded((pixels - low) / (high - low)),
        "maps": _rounded(maps[:, :, chosen].permute(1, 2, 0, 3, 4)),
    }


def inference_steps(run: TrainedRun) -> dict[str, Any]:
    """Test accuracy with several numbers of Picard steps, and at the fixed point."""
    if not isinstance(run.model, IMixer):
        raise ValueError(f"a {type(run.model).__name__} takes no solver steps, which are an iMixer's")
    model, device = run.model, next(run.model.parameters()).device
    loader = make_loader(
        run.data.test,
        batch_size=run.config.batch_size,
        training=False,
        workers=run.config.workers,
        seed=run.config.seed,
        device=device,
    )
    top1 = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that do not converge show in the accuracy
        for steps in run.test_steps:
            model.set_solver(solver="picard", rtol=None, n_iter=steps, backward="unrolled")
            top1[str(steps)] = evaluate(model, loader).top1
        model.set_solver(**FIXED_POINT)  # type: ignore[arg-type]
        top1["fixed point"] = evaluate(model, loader).top1
    return {"top1": top1}


def certificate(run: TrainedRun) -> dict[str, Any]:
    """The largest certain bound of a layer, and the largest rate of one, which is the median over its rows."""
    rows = certify(run.model, run.test_images(IMAGES), show=False)
    rates = [row.rate for row in rows if row.rate is not None]
    return {"bound": max(row.bound for row in rows), "rate": max(rates, default=None)}


def step(run: TrainedRun) -> dict[str, Any]:
    """Costs and gradient of a training step, before, in the middle of and after the training."""
    return {"points": measure_steps(run.config, run.data, run.folder)}


def _rounded(values: Tensor) -> Any:
    return [round(value, 4) for value in values.tolist()] if values.dim() == 1 else [_rounded(v) for v in values]


MEASUREMENTS: dict[str, Callable[[TrainedRun], dict[str, Any]]] = {
    "iteration": iteration,
    "feature-maps": feature_maps,
    "inference-steps": inference_steps,
    "certificate": certificate,
    "step": step,
}
