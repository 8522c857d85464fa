"""The learning rate, as a function of where a run stands."""

from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer

from imixer.training.config import TrainingConfig


class Schedule:
    """timm's schedule for an optimizer. It has no state: `move_to` sets the rate for any position.

    Args:
        config: The settings.
        optimizer: The optimizer whose rates are set.
        lr: Peak learning rate.
        updates_per_epoch: Updates of the weights in an epoch.

    Attributes:
        num_epochs: Epochs to train, the cool-down included.
    """

    def __init__(self, config: TrainingConfig, optimizer: Optimizer, *, lr: float, updates_per_epoch: int) -> None:
        self._optimizer = optimizer
        self._on_updates = config.sched_on_updates
        # Early versions of timm do not know a constant rate by its name: steps that change nothing.
        constant = config.sched == "constant"
        self._scheduler, self.num_epochs = create_scheduler_v2(
            optimizer,
            sched="step" if constant else config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            # A warm-up rises and a schedule falls, from and to whatever rate.
            warmup_lr=min(config.warmup_lr, lr),
            min_lr=min(config.min_lr, lr),
            cooldown_epochs=config.cooldown_epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=1.0 if constant else config.decay_rate,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )

    @property
    def lr(self) -> float:
        """The rate now; with layer decay, the largest."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def move_to(self, epoch: int, updates: int) -> None:
        """Set the rate for the next update: after so many finished epochs, and updates in all."""
        if self._on_updates:
            self._scheduler.step_update(updates)
        else:
            self._scheduler.step(epoch)
