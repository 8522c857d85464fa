"""Training of image classifiers from timm's registry: one loop that reads straight down.

`train(config, data)` builds the model, trains it, and leaves its settings, curves and checkpoints in a folder, which
`imixer.training.run_folder` describes.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from imixer.data import ImageData, make_loader
from imixer.training.checkpoints import LAST, save_checkpoint
from imixer.training.config import TrainingConfig
from imixer.training.distributed import adder, make_accelerator
from imixer.training.evaluation import evaluate
from imixer.training.imlp_report import look_at_imlps
from imixer.training.interruption import StopSignals, TrainingInterruptedError
from imixer.training.learner import Learner
from imixer.training.objective import make_mixup, seed_step
from imixer.training.plots import plot_curves
from imixer.training.progress import write_results
from imixer.training.reporting import Report
from imixer.training.resuming import Start, begin, describe_changes, identity
from imixer.training.run_folder import EpochMetrics, environment
from imixer.training.schedule import Schedule

IMLP_IMAGES = 16  # test images that the iMLPs are looked at on, after every epoch


class NonFiniteError(RuntimeError):
    """The training loss or its gradient was NaN or infinite in too many updates in a row."""


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


def train(
    config: TrainingConfig,
    data: ImageData,
    *,
    resume: Path | None = None,
    allow_other_data: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a model, testing and saving it after every epoch.

    On the CPU, and one version of PyTorch, the same `config` and images give the same weights, bit by bit, however
    often the run was stopped and resumed. All processes that `torchrun` or `accelerate launch` started call it.
    Accelerate keeps the first device and precision of a process: a second run in it cannot choose others.

    Args:
        config: The settings.
        data: The images, from `load_data(config)`.
        resume: Folder of a run to continue, or one of its checkpoints, as `imixer.training.resuming.begin` says.
        allow_other_data: Whether to continue it with images whose `fingerprint` is another, of the same classes.
        progress: Whether the first process shows a progress bar, and prints a line per epoch.

    Raises:
        ValueError: The model or the device does not exist, the output folder holds a run, or the run to resume is of
            another model, batch or data set.
        OSError: A file cannot be read or written, or another process runs in the folder; what was saved before is
            still there.
        NonFiniteError: The loss or the gradient was not finite in `config.max_nonfinite` updates in a row.
        TrainingInterruptedError: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came; the run was saved.
    """
    accelerator = make_accelerator(config)
    with begin(config, data, accelerator, resume, allow_other_data=allow_other_data) as start:
        return _train(config, data, accelerator, start, progress)


def _train(
    config: TrainingConfig, data: ImageData, accelerator: Accelerator, start: Start, progress: bool
) -> TrainingResult:
    """As `train`, in a folder that is this run's."""
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    first = accelerator.is_main_process
    this_run = {**identity(config, data, world_size), "data": start.fingerprint}
    folder, checkpoint, at = start.folder, start.checkpoint, start.progress

    set_seed(config.seed)
    learner = Learner(config, data, accelerator, checkpoint)
    loader = partial(make_loader, workers=config.workers, seed=config.seed, rank=rank, world_size=world_size)
    train_loader = loader(
        data.train,
        batch_size=config.batch_size,
        training=True,
        device=device,
        mixup=make_mixup(config, len(data.classes)),
        mixup_off_epoch=config.mixup_off_epoch,
    )
    test_batch = config.validation_batch_size or config.batch_size
    test_loader = loader(data.test, batch_size=test_batch, training=False, device=device)
    num_steps, group = len(train_loader), config.grad_accum_steps
    schedule = Schedule(config, learner.optimizer, updates_per_epoch=math.ceil(num_steps / group))
    max_updates, max_seconds = config.checkpoint_every
    add = adder(accelerator)
    about = {"model": config.model, "data": data.name, **environment()}

    with StopSignals() as stop, Report(folder, first=first, progress=progress) as report:
        started = time.monotonic() - at.seconds
        saved_time, saved_updates = time.monotonic(), at.updates

        def save() -> None:
            nonlocal saved_time, saved_updates
            at.seconds = time.monotonic() - started
            state = {**learner.state(), **this_run, "progress": at.as_dict(), "epoch": at.epoch}
            state |= {"mean": list(data.mean), "std": list(data.std), "config": asdict(config), "environment": about}
            if first:
                save_checkpoint(folder, state, best=at.step == 0 and at.best is at.metrics[-1])
            accelerator.wait_for_everyone()
            saved_time, saved_updates = time.monotonic(), at.updates

        report.say(f"{data.description}\n{_describe(config, learner, schedule, world_size)}; {folder}")
        for note in (*start.notes, *learner.notes):
            report.say(note)
        if checkpoint is not None:
            changes = describe_changes(checkpoint, config)
            report.say(f"continuing after epoch {at.epoch}, step {at.step} of {num_steps}{changes}")
        epoch_images = min(len(data.train), num_steps * config.batch_size * world_size)
        done = int(epoch_images * (at.epoch + at.step / num_steps))
        report.start(epoch_images * schedule.num_epochs, done, at.updates)
        for epoch in range(at.epoch, schedule.num_epochs):
            train_loader.sampler.set_epoch(epoch, start_batch=at.step)
            learner.start_epoch()
            epoch_started, images_seen = time.monotonic(), 0
            loss, num_images = torch.zeros((), device=device), 0
            for step, (images, targets) in enumerate(train_loader, start=at.step):
                seed_step(config.seed, epoch, step, rank)
                # The last update of an epoch may have fewer batches to it.
                share = 1 / min(group, num_steps - step // group * group)
                updating = (step + 1) % group == 0 or step + 1 == num_steps
                loss += learner.add_gradient(images, targets, share=share, last=updating)
                num_images += len(targets) * world_size
                if not updating:
                    continue

                schedule.move_to(epoch, at.updates)
                loss_here, norm = learner.measure(loss)
                due = first and time.monotonic() - saved_time >= max_seconds
                loss_sum, stops, dues = add([loss_here, stop.received is not None, due])
                loss_value = loss_sum / world_size
                finite = math.isfinite(loss_value) and math.isfinite(norm)
                learner.update(at.updates + 1, finite=finite)
                at.count(step + 1, loss_value, finite=finite, lr=schedule.lr)

                images_seen += num_images
                report.update(num_images, epoch=f"{epoch + 1}", loss=f"{loss_value:.3f}", lr=f"{schedule.lr:.1e}")
                if at.updates % config.log_interval == 0:
                    speed = images_seen / (time.monotonic() - epoch_started)
                    curves = {"loss": loss_value, "lr": schedule.lr, "gradient_norm": norm, "images_per_second": speed}
                    report.write({f"train/{name}": value for name, value in curves.items()}, at.updates)
                loss, num_images = torch.zeros((), device=device), 0

                if not finite:
                    what = (
                        f"epoch {epoch + 1}, step {step + 1} of {num_steps}: loss {loss_value:.4g}, gradient norm "
                        f"{norm:.4g}, learning rate {schedule.lr:.2e}"
                    )
                    report.say(f"{what}: not finite, update left out ({at.nonfinite_in_row} in a row)")
                    if at.nonfinite_in_row == config.max_nonfinite:
                        save()
                        raise NonFiniteError(
                            f"the loss or its gradient was not finite in {at.nonfinite_in_row} updates in a row, "
                            f"which were left out; the last in {what}. Try a smaller --lr, more --warmup-epochs, or "
                            f"no --amp; --resume {folder} goes on from here"
                        )
                if stops:
                    save()
                    raise TrainingInterruptedError(
                        f"stopped in epoch {epoch + 1} after step {step + 1} of {num_steps}, saved {folder / LAST}; "
                        f"continue with --resume {folder}",
                        stop.received,
                    )
                if dues or at.updates - saved_updates >= max_updates:
                    save()

            speed = images_seen / (time.monotonic() - epoch_started)
            learner.end_epoch()
            tested, averaged = evaluate(learner.plain, test_loader, accelerator), learner.averaged()
            row = EpochMetrics(
                epoch=epoch + 1,
                lr=at.lr,
                train_loss=at.train_loss,
                test_loss=tested.loss,
                test_top1=tested.top1,
                test_top5=tested.top5,
                ema_top1=evaluate(averaged, test_loader, accelerator).top1 if averaged is not None else None,
                nonfinite=at.nonfinite,
                images_per_second=round(speed, 1),
                seconds=round(time.monotonic() - started, 2),
            )
            whole = learner.whole_model()
            imlps = []
            if whole is not None:
                images, targets = data.some_test_images(IMLP_IMAGES)
                imlps = look_at_imlps(whole, images.to(device), targets.to(device))
            at.finish_epoch(row, imlps)
            save()
            if first:
                write_results(folder, at, about)
            report.epoch(row, schedule.num_epochs, imlps, at.updates)

    if first:
        write_results(folder, at, about)  # again, for a run that was killed right before the last time
        plot_curves(folder / "curves.csv", folder / "curves.png", title=f"{config.model} on {data.name}")
    return TrainingResult(model=learner.trained(), metrics=at.metrics, output=folder)


def _describe(config: TrainingConfig, learner: Learner, schedule: Schedule, world_size: int) -> str:
    """One line of what is trained, and how."""
    accelerator, group = learner.accelerator, config.grad_accum_steps
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    num_parameters = sum(parameter.numel() for parameter in learner.plain.parameters())
    return (
        f"{config.model}: {num_parameters:,} parameters, {precision}, {processes} on {accelerator.device.type}; "
        f"{config.batch_size} x {world_size} x {group} = "
        f"{config.batch_size * world_size * group} images to an update, {schedule.num_epochs} epochs"
    )
