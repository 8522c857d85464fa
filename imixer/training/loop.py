"""Training of image classifiers from timm's registry: one loop that reads straight down.

`train(config, data)` builds the model, trains it, and leaves its settings, curves and checkpoints in a folder, which
`imixer.training.run_folder` describes.
"""

import copy
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from imixer.data import ImageBatch, ImageData, LoaderError, UnreadableImageError, make_loader
from imixer.training.background import BackgroundWriter
from imixer.training.checkpoints import LAST, save_checkpoint
from imixer.training.config import TrainingConfig
from imixer.training.distributed import make_accelerator
from imixer.training.evaluation import evaluate
from imixer.training.imlp_report import look_at_imlps
from imixer.training.interruption import StopSignals, TrainingInterruptedError
from imixer.training.learner import Learner, NonFiniteError
from imixer.training.objective import make_mixup, seed_step
from imixer.training.plots import plot_curves
from imixer.training.progress import Progress, write_results
from imixer.training.reporting import Report, check_trackers
from imixer.training.resuming import Start, begin, describe_changes, identity, prepare
from imixer.training.run_folder import EpochMetrics, environment
from imixer.training.schedule import Schedule
from imixer.training.solve_statistics import monitored_solves
from implicit.diagnostics import OnItsWay, SolveMonitor

IMLP_IMAGES = 16  # test images that the iMLPs are looked at on
# Updates that are under way before the first one's loss is looked at, by the kind of device.
UPDATES_AHEAD = {"cuda": 1}


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
        NonFiniteError: The loss or the gradient was not finite in `config.max_nonfinite` updates in a row, or the
            weights are not.
        TrainingInterruptedError: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came; the run was saved.
    """
    check_trackers(config)
    accelerator = make_accelerator(config)
    config.batches(accelerator.num_processes)  # raises before the folder is claimed
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

    batch_size, group = config.batches(world_size)
    report = Report(folder, config, accelerator, progress=progress)

    set_seed(config.seed)
    images_per_update = min(batch_size * world_size * group, len(data.train))
    lr = config.peak_lr(images_per_update)
    learner = Learner(config, data, accelerator, checkpoint, lr=lr)
    loader = partial(make_loader, workers=config.workers, seed=config.seed, rank=rank, world_size=world_size)
    train_loader = loader(
        data.train,
        batch_size=batch_size,
        training=True,
        device=device,
        mixup=make_mixup(config, len(data.classes)),
        mixup_off_epoch=config.mixup_off_epoch,
    )
    test_batch = config.validation_batch_size or config.batch_size
    test_loader = loader(data.test, batch_size=test_batch, training=False, device=device)
    num_steps = len(train_loader)
    schedule = Schedule(config, learner.optimizer, lr=lr, updates_per_epoch=math.ceil(num_steps / group))
    if at.updates:  # the rate of the last update, which is saved again if no other one comes before
        schedule.move_to(at.epoch if at.step else at.epoch - 1, at.updates - 1)
    epoch_images = min(len(data.train), num_steps * batch_size * world_size)
    about = {"model": config.model, "data": data.name, **environment()}
    notes = [*start.notes, *prepare(start, config, accelerator), *learner.notes, *config.without_effect]
    if checkpoint is not None:
        changed = describe_changes(checkpoint, config)
        notes.append(f"continuing after epoch {at.epoch}, step {at.step} of {num_steps}{changed}")
        checkpoint.clear()  # or its tensors would stay in memory for as long as the run

    with (
        StopSignals() as stop,
        report,
        monitored_solves(config, learner, folder, report, updates=at.updates) as solves,
        BackgroundWriter() as writer,
    ):
        run = _Run(
            config=config,
            accelerator=accelerator,
            learner=learner,
            schedule=schedule,
            at=at,
            folder=folder,
            report=report,
            stop=stop,
            solves=solves,
            writer=writer,
            num_steps=num_steps,
            described={**this_run, "mean": list(data.mean), "std": list(data.std), "environment": about},
        )
        report.say(f"{data.description}\n{_describe(config, learner, schedule, lr, images_per_update)}; {folder}")
        for note in notes:
            report.say(note)
        done = int(epoch_images * (at.epoch + at.step / num_steps))
        report.start(epoch_images * schedule.num_epochs, done, at.updates)
        for epoch in range(at.epoch, schedule.num_epochs):
            try:
                train_loader.sampler.set_epoch(epoch, start_batch=at.step)
                speed = run.train_epoch(epoch, train_loader)
                with report.timing("test"):
                    learner.end_epoch()
                    tested, averaged = evaluate(learner.plain, test_loader, accelerator), learner.averaged()
                    ema_top1 = evaluate(averaged, test_loader, accelerator).top1 if averaged is not None else None
            except (UnreadableImageError, LoaderError) as error:
                run.give_up(error)
            learner.check_weights(epoch, folder)
            imlps = []
            if (epoch + 1) % config.report_interval == 0 or epoch + 1 == schedule.num_epochs:
                with report.timing("report"):
                    whole = learner.whole_model()
                    if whole is not None:
                        images, targets = data.some_test_images(IMLP_IMAGES)
                        imlps = look_at_imlps(whole, images.to(device), targets.to(device))
            if solves is not None:
                solves.skip()
            row = EpochMetrics(
                epoch=epoch + 1,
                lr=at.lr,
                train_loss=at.train_loss,
                test_loss=tested.loss,
                test_top1=tested.top1,
                test_top5=tested.top5,
                ema_top1=ema_top1,
                nonfinite=at.nonfinite,
                images_per_second=round(speed, 1),
                seconds=round(run.seconds(), 2),
            )
            at.finish_epoch(row, imlps)
            run.save()
            report.epoch(row, schedule.num_epochs, imlps, at.updates)

    if first:
        write_results(folder, at, about)  # again, for a run that was killed right before the last time
        plot_curves(folder / "curves.csv", folder / "curves.png", title=f"{config.model} on {data.name}")
    return TrainingResult(model=learner.trained(), metrics=at.metrics, output=folder)


@dataclass(frozen=True, kw_only=True)
class _SentUpdate:
    """An update that was given to the device, whose numbers are on their way.

    Args:
        step: Batches of the epoch that are done with it.
        images: Its images, of all processes.
        lr: Its learning rate.
        numbers: Loss, gradient norm, 1 if they are finite, and how many processes were told to stop or want to save.
    """

    step: int
    images: int
    lr: float
    numbers: OnItsWay


class _Run:
    """The part of a run between its beginning and its end: updates, what they call for, and checkpoints.

    The numbers of an update are looked at when the next ones are under way (`UPDATES_AHEAD`), so that the device always
    has work. They are sums over all processes, so that all of them come to the same decisions at the same step.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        accelerator: Accelerator,
        learner: Learner,
        schedule: Schedule,
        at: Progress,
        folder: Path,
        report: Report,
        stop: StopSignals,
        solves: SolveMonitor | None,
        writer: BackgroundWriter,
        num_steps: int,
        described: dict[str, Any],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.learner = learner
        self.schedule = schedule
        self.at = at
        self.folder = folder
        self.report = report
        self.stop = stop
        self.solves = solves
        self.writer = writer
        self.num_steps = num_steps
        self.described = described
        self.sent: deque[_SentUpdate] = deque()
        self.ahead = UPDATES_AHEAD.get(accelerator.device.type, 0)
        self.started = time.monotonic() - at.seconds
        self.saved_time, self.saved_updates = time.monotonic(), at.updates
        self.stopping = self.save_is_due = False
        self.failure = ""

    def seconds(self) -> float:
        """Time spent in training, over all its parts."""
        return time.monotonic() - self.started

    def train_epoch(self, epoch: int, batches: Iterable[ImageBatch]) -> float:
        """Train on the batches that are left of an epoch; return the images per second."""
        config, at, learner, first = self.config, self.at, self.learner, self.accelerator.is_main_process
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        _, group = config.batches(world_size)
        max_updates, max_seconds = config.checkpoint_every
        learner.start_epoch()
        self.epoch_started, self.images_seen, num_images = time.monotonic(), 0, 0
        with self.report.timing("steps"):
            for step, (images, targets) in enumerate(batches, start=at.step):
                seed_step(config.seed, epoch, step, rank)
                # The last update of an epoch may have fewer batches to it.
                share = 1 / min(group, self.num_steps - step // group * group)
                updating = (step + 1) % group == 0 or step + 1 == self.num_steps
                learner.add_gradient(images, targets, share=share, last=updating)
                num_images += len(targets) * world_size
                if not updating:
                    continue
                updates = at.updates + len(self.sent)
                self.schedule.move_to(epoch, updates)
                save_is_due = first and time.monotonic() - self.saved_time >= max_seconds
                numbers = learner.step.update(updates + 1, (self.stop.received is not None, save_is_due))
                sent = _SentUpdate(step=step + 1, images=num_images, lr=self.schedule.lr, numbers=OnItsWay(numbers))
                self.sent.append(sent)
                if self.solves is not None:
                    self.solves.step(updates + 1)
                num_images = 0
                self.read(self.ahead)
                self.obey()
                if self.save_is_due or updates + 1 - self.saved_updates >= max_updates:
                    self.save()
            self.read()
            self.obey()
        return self.images_seen / (time.monotonic() - self.epoch_started)

    def read(self, under_way: int = 0) -> None:
        """Wait for the numbers of all updates but the last ones, count and report them."""
        at, config = self.at, self.config
        while len(self.sent) > under_way:
            sent = self.sent.popleft()
            loss, norm, finite, stops, saves = sent.numbers.arrived()
            at.count(sent.step, loss, finite=bool(finite), lr=sent.lr)
            self.stopping |= stops > 0
            self.save_is_due |= saves > 0
            self.images_seen += sent.images
            self.report.update(sent.images, epoch=f"{at.epoch + 1}", loss=f"{loss:.3f}", lr=f"{sent.lr:.1e}")
            if at.updates % config.log_interval == 0:
                speed = self.images_seen / (time.monotonic() - self.epoch_started)
                curves = {"loss": loss, "lr": sent.lr, "gradient_norm": norm, "images_per_second": speed}
                self.report.log({f"train/{name}": value for name, value in curves.items()}, at.updates)
            if not finite:
                what = (
                    f"epoch {at.epoch + 1}, step {sent.step} of {self.num_steps}: loss {loss:.4g}, gradient norm "
                    f"{norm:.4g}, learning rate {sent.lr:.2e}"
                )
                self.report.say(f"{what}: not finite, update left out ({at.nonfinite_in_row} in a row)")
                if at.nonfinite_in_row == config.max_nonfinite:
                    self.failure = (
                        f"the loss or its gradient was not finite in {at.nonfinite_in_row} updates in a row, "
                        f"which were left out; the last in {what}. Try a smaller --lr, more --warmup-epochs, or "
                        f"no --amp; --resume {self.folder} goes on from here"
                    )

    def obey(self) -> None:
        """Save and raise if the updates that were read call for it."""
        if self.failure:
            self.save(wait=True)
            raise NonFiniteError(self.failure)
        if self.stopping:
            self.save(wait=True)
            raise TrainingInterruptedError(
                f"stopped in epoch {self.at.epoch + 1} after step {self.at.step} of {self.num_steps}, saved "
                f"{self.folder / LAST}; continue with --resume {self.folder}",
                self.stop.received,
            )

    def give_up(self, error: UnreadableImageError | LoaderError) -> NoReturn:
        """Save what was trained until images failed, and raise the error with the way to go on.

        Of several processes, the others wait for this one inside an update and cannot save with it.
        """
        if self.accelerator.num_processes > 1:
            raise type(error)(f"{error}; --resume {self.folder} goes on from the last checkpoint") from error
        self.learner.step.forget()
        self.save(wait=True)
        raise type(error)(
            f"{error}; saved {self.folder / LAST} in epoch {self.at.epoch + 1} after step {self.at.step} of "
            f"{self.num_steps}: when this is mended, --resume {self.folder} goes on from there (with "
            "--allow-other-data if the file now has another size)"
        ) from error

    def save(self, *, wait: bool = False) -> None:
        """Copy the state to the host and write it in the background, or wait until it is written.

        All processes have to call it.
        """
        self.read()
        with self.report.timing("checkpoint"):
            self.at.seconds = self.seconds()
            state = {**self.learner.state(), **self.described, "config": asdict(self.config)}
            state |= {"progress": self.at.as_dict(), "epoch": self.at.epoch}
            if self.accelerator.is_main_process:
                self.writer.start(partial(_write, self.folder, state, copy.deepcopy(self.at)))
            if wait:
                self.writer.join()
                self.accelerator.wait_for_everyone()
        self.saved_time, self.saved_updates, self.save_is_due = time.monotonic(), self.at.updates, False


def _write(folder: Path, state: dict[str, Any], at: Progress) -> None:
    """Write a checkpoint, and after an epoch its results."""
    tested = at.step == 0 and bool(at.metrics)
    save_checkpoint(folder, state, best=tested and at.best is at.metrics[-1])
    if tested:
        write_results(folder, at, state["environment"])


def _describe(config: TrainingConfig, learner: Learner, schedule: Schedule, lr: float, images: int) -> str:
    """One line of what is trained, and how."""
    accelerator, world_size = learner.accelerator, learner.accelerator.num_processes
    batch_size, group = config.batches(world_size)
    asked = batch_size * world_size * group
    only = "" if images == asked else f" (there are {images})"
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    num_parameters = sum(parameter.numel() for parameter in learner.plain.parameters())
    scaled = "as given"
    if config.lr is None:
        scaled = f"{config.lr_base:.3g} at {config.lr_base_size} images, {config.lr_scale}"
    return (
        f"{config.model}: {num_parameters:,} parameters, {precision}, {processes} on {accelerator.device.type}; "
        f"{batch_size} x {world_size} x {group} = {asked} images to an update{only}, {schedule.num_epochs} epochs; "
        f"learning rate {lr:.3g} ({scaled})"
    )
