"""The model in training, and everything that follows its weights."""

import contextlib
import math
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from imixer.data import ImageData
from imixer.training.config import TrainingConfig
from imixer.training.distributed import load_optimizer, whole_state
from imixer.training.model import build_optimizer, catch_up_norms, create_model, load_first_weights
from imixer.training.objective import make_loss
from imixer.training.resuming import restoring


class Learner:
    """A model with its loss, its optimizer and the average of its weights, on this process's device.

    Args:
        config: The settings.
        data: The images, for the model's inputs and outputs.
        accelerator: Device, precision and processes.
        checkpoint: What `state` gave, to go on from.

    Attributes:
        plain: The model without the wrapper of data-parallel training; what is tested and saved.
        optimizer: timm's.
        ema: timm's average of the weights, or None.
        notes: What to say about the first weights.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageData,
        accelerator: Accelerator,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self._data = data
        self.plain = create_model(config, data).to(accelerator.device)
        if config.channels_last:
            self.plain = self.plain.to(memory_format=torch.channels_last)
        self.notes: list[str] = []
        if checkpoint is not None:
            with restoring("weights"):
                self.plain.load_state_dict(checkpoint["state_dict"])
        elif config.initial_checkpoint:
            self.notes.append(load_first_weights(self.plain, config))
        self.ema = None
        if config.model_ema:
            self.ema = ModelEmaV3(self.plain, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
            if checkpoint is not None and checkpoint["state_dict_ema"] is not None:
                with restoring("averaged weights"):
                    self.ema.module.load_state_dict(checkpoint["state_dict_ema"])
        if config.torchcompile:
            self.plain.compile(backend=config.torchcompile, mode=config.torchcompile_mode)  # in place, names stay
        self._model = accelerator.prepare_model(self.plain)
        self.optimizer = build_optimizer(config, self.plain)
        self._scaled_optimizer = accelerator.prepare_optimizer(self.optimizer)
        if checkpoint is not None:
            with restoring("optimizer"):
                load_optimizer(self.plain, self.optimizer, checkpoint["optimizer"])
            if accelerator.scaler is not None and checkpoint["scaler"] is not None:
                with restoring("gradient scaler"):
                    accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self._loss = make_loss(config).to(accelerator.device)

    def start_epoch(self) -> None:
        """Make ready for the training part of an epoch."""
        self._model.train()

    def add_gradient(self, images: Tensor, targets: Tensor, *, share: float, last: bool) -> Tensor:
        """Add the gradient of ``share`` of a batch's loss, and return that share of it.

        Args:
            images: (B, C, H, W), on the device.
            targets: (B,) classes, or (B, classes) soft targets.
            share: One over the number of batches to the update.
            last: Whether the update comes next, so that processes exchange their gradients now.
        """
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self._model):
            with self.accelerator.autocast():
                logits = self._model(images)  # (B, classes)
            loss: Tensor = self._loss(logits.float(), targets) * share
            self.accelerator.backward(loss)
        return loss.detach()

    def measure(self, loss: Tensor) -> tuple[float, float]:
        """Clip the gradient, and copy this process's loss, and the norm before clipping, to the host.

        The norm is that of the gradient of all processes, and the same in each.
        """
        norm = self.accelerator.clip_grad_norm_(self._model.parameters(), self.config.clip_grad or math.inf)
        values = torch.stack([loss.float(), norm.float()]).tolist()  # the one wait for the device in an update
        return values[0], values[1]

    def update(self, updates: int, *, finite: bool) -> None:
        """Change the weights by the gradient, if it is finite, and forget it.

        Args:
            updates: How many updates there have been with this one.
            finite: Whether the loss and the gradient are.
        """
        if finite or self.accelerator.scaler is not None:
            # float16's scaler leaves out a step that is not finite by itself, and goes on with a smaller scale.
            self._scaled_optimizer.step()
        self._scaled_optimizer.zero_grad()
        if finite and self.ema is not None:
            self.ema.update(self.plain, step=updates)

    def end_epoch(self) -> None:
        """Make ready to be tested: running statistics of batch normalizations become those of all processes."""
        if self.accelerator.num_processes > 1:
            for model in [self.plain] if self.ema is None else [self.plain, self.ema.module]:
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def averaged(self) -> nn.Module | None:
        """The model with averaged weights, ready to be tested; None if there is none."""
        if self.ema is None:
            return None
        averaged: nn.Module = self.ema.module
        catch_up_norms(averaged)
        return averaged

    def whole_model(self) -> nn.Module | None:
        """In the first process the model with whole weights, in float32, not compiled, to be looked into; else None.

        All processes have to call it.
        """
        first = self.accelerator.is_main_process
        if not (self.config.torchcompile or self.config.amp):
            return self.plain if first else None
        weights, _ = whole_state(self.plain, self.optimizer)
        if not first:
            return None
        model = create_model(self.config, self._data).to(self.accelerator.device)
        model.load_state_dict(weights)
        return model

    def state(self) -> dict[str, Any]:
        """What a run goes on from. All processes have to call it; the first one gets the tensors."""
        weights, optimizer = whole_state(self.plain, self.optimizer)
        scaler = self.accelerator.scaler
        return {
            "state_dict": weights,
            "state_dict_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def trained(self) -> nn.Module:
        """The model in eval mode, without what mixed precision put on it."""
        model: nn.Module = self.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        return model.eval()
