"""Training of image classifiers from timm's registry: one loop that reads straight down.

`train(config, data)` builds the model, trains it, and leaves its settings, curves and checkpoint in a folder,
which `imixer.run_folder` describes.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from imixer.data import ImageBatch, ImageData, load_digits, load_image_folder, make_loader
from imixer.plots import plot_curves
from imixer.run_folder import EpochMetrics, prepare_output, save_checkpoint, write_curves
from imixer.training_config import AMP_DTYPES, TrainingConfig

READ_LOSSES_EVERY = 20  # steps between copies of the losses to the host, each of which waits for the GPU


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run.

    Args:
        model: The trained model, in evaluation mode, on the device it was trained on.
        metrics: One entry per epoch.
        output: Folder of the run's files.
    """

    model: nn.Module
    metrics: list[EpochMetrics]
    output: Path


def load_data(config: TrainingConfig, *, progress: bool = False) -> ImageData:
    """Load the images that `config` names, at the size that its model takes."""
    check_model_name(config.model)
    if config.data_dir is None:
        return load_digits(img_size=config.img_size or 8, augment=not config.no_aug)
    model_cfg = timm.get_pretrained_cfg(config.model, allow_unregistered=True)
    model_size = model_cfg.input_size[-1] if model_cfg is not None else 224
    return load_image_folder(
        config.data_dir,
        img_size=config.img_size or model_size,
        augment=not config.no_aug,
        hflip=config.hflip,
        cache_mb=config.cache_mb,
        progress=progress,
    )


def check_model_name(name: str) -> None:
    """Raise a ValueError that lists what exists if timm knows no model of this name."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    imixers = ", ".join(timm.list_models("imixer*"))
    raise ValueError(f"unknown model {name!r}; {hint}the iMixers are {imixers}")


def model_arguments(config: TrainingConfig, data: ImageData) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that `config` sets or `data` demands."""
    img_size, patch_size = config.img_size, config.patch_size
    if config.data_dir is None:
        # Digits are smaller than any model's own size, and its own patches would leave few tokens.
        img_size = data.img_size
        patch_size = patch_size or max(img_size // 4, 1)
    arguments = {
        "num_classes": len(data.classes),
        "in_chans": data.in_chans,
        "img_size": img_size,
        "patch_size": patch_size,
        "num_blocks": config.num_blocks,
        "embed_dim": config.embed_dim,
        "h_ratio": config.h_ratio,
        "n_iter": config.n_iter,
        "n_power": config.n_power,
        "coeff": config.coeff,
        "solver": config.solver,
        "backward": config.backward,
        "rtol": config.rtol,
        "drop_path_rate": config.drop_path,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def build_model(config: TrainingConfig, data: ImageData) -> nn.Module:
    """Create the model with fresh weights.

    Raises:
        ValueError: The model does not exist, or does not take the arguments.
    """
    check_model_name(config.model)
    arguments = model_arguments(config, data)
    try:
        return timm.create_model(config.model, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"cannot build {config.model} with {given}: {error}") from error


def train(config: TrainingConfig, data: ImageData, *, progress: bool = True) -> TrainingResult:
    """Train a model, testing and saving it after every epoch.

    On the CPU, and one version of PyTorch, the same `config` and images give the same curves. One process
    trains on one device in one precision: Accelerate refuses another one later in the same process.

    Args:
        config: The settings.
        data: The images, from `load_data(config)`.
        progress: Whether to show progress bars and print a line per epoch.

    Raises:
        ValueError: The model or the device does not exist, or the output folder holds another run.
        OSError: The output folder cannot be written.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    accelerator = _accelerator(config)
    say: Callable[[str], None] = tqdm.write if progress else lambda _: None
    set_seed(config.seed)
    model = build_model(config, data)
    output = prepare_output(config, data, say)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = config.amp_dtype if config.amp else "float32"
    say(data.description)
    say(f"{config.model}: {num_parameters:,} parameters, {accelerator.device}, {precision}")

    train_loader = make_loader(
        data.train, batch_size=config.batch_size, training=True, workers=config.workers, seed=config.seed
    )
    test_loader = make_loader(
        data.test, batch_size=config.batch_size, training=False, workers=config.workers, seed=config.seed
    )
    optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    # The schedule counts epochs in updates: a run of few epochs would otherwise take its warm-up in one jump.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=min(config.warmup_lr, config.lr),
        min_lr=min(config.min_lr, config.lr),
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    train_loss_fn = LabelSmoothingCrossEntropy(config.smoothing)

    metrics: list[EpochMetrics] = []
    start = time.monotonic()
    num_updates = 0
    bar = tqdm(total=config.epochs * len(train_loader), desc="training", unit="step", disable=not progress)
    with bar:
        for epoch in range(1, config.epochs + 1):
            model.train()
            losses: list[float] = []
            rates: list[float] = []
            unread: list[Tensor] = []  # losses not copied to the host yet
            for step, (images, targets) in enumerate(train_loader, start=1):
                loss = train_loss_fn(model(images), targets)
                accelerator.backward(loss)
                if config.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                rates.append(optimizer.param_groups[0]["lr"])
                num_updates += 1
                scheduler.step_update(num_updates)

                unread.append(loss.detach())
                if len(unread) == READ_LOSSES_EVERY or step == len(train_loader):
                    losses += torch.stack(unread).tolist()
                    unread.clear()
                    _check_finite(losses, rates, epoch=epoch, num_steps=len(train_loader), output=output)
                    bar.set_postfix(epoch=f"{epoch}/{config.epochs}", loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()

            test_loss, test_top1 = evaluate(model, test_loader)
            row = EpochMetrics(
                epoch=epoch,
                lr=rates[-1],
                train_loss=sum(losses) / len(losses),
                test_loss=test_loss,
                test_top1=test_top1,
                seconds=round(time.monotonic() - start, 2),
            )
            metrics.append(row)
            weights = accelerator.unwrap_model(model).state_dict()
            save_checkpoint(
                output / "checkpoint.pt",
                weights,
                config=config,
                model_args=model_arguments(config, data),
                data=data,
                metrics=row,
            )
            write_curves(output / "curves.csv", metrics)
            say(f"epoch {epoch:>3}/{config.epochs}  {row.summary()}")

    plot_curves(output / "curves.csv", output / "curves.png", title=f"{config.model} on {data.name}")
    trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return TrainingResult(model=trained.eval(), metrics=metrics, output=output)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[ImageBatch]) -> tuple[float, float]:
    """Return the mean cross-entropy and the top-1 accuracy in percent of `model` over `loader`."""
    model.eval()
    device = next(model.parameters()).device
    loss_sum, num_correct, num_images = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, targets in loader:
        logits = model(images).float()  # (B, classes)
        loss_sum += nn.functional.cross_entropy(logits, targets, reduction="sum")
        num_correct += (logits.argmax(dim=1) == targets).sum()
        num_images += len(targets)
    return loss_sum.item() / num_images, 100 * num_correct.item() / num_images


def _accelerator(config: TrainingConfig) -> Accelerator:
    """Set up the device and the precision."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here: torch.cuda.is_available() is False; use --device cpu")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.amp and config.amp_dtype == "float16" and on_cpu:
        raise ValueError("amp_dtype float16 needs a CUDA device; on the CPU use --amp-dtype bfloat16")
    return Accelerator(cpu=on_cpu, mixed_precision=AMP_DTYPES[config.amp_dtype] if config.amp else "no")


def _check_finite(losses: list[float], rates: list[float], *, epoch: int, num_steps: int, output: Path) -> None:
    """Raise if a loss of this epoch is NaN or infinite."""
    for step, (loss, lr) in enumerate(zip(losses, rates, strict=True), start=1):
        if not math.isfinite(loss):
            kept = f"{output} keeps epoch {epoch - 1}" if epoch > 1 else "no epoch was finished"
            raise NonFiniteLossError(
                f"the training loss is {loss} in epoch {epoch}, step {step} of {num_steps}, at learning rate "
                f"{lr:.2e}; try a smaller --lr, more --warmup-epochs, or no --amp ({kept})"
            )
