"""The model in training, and everything that follows its weights."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import Lookahead
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from imixer.data import ImageData
from imixer.training.config import TrainingConfig
from imixer.training.distributed import load_optimizer, whole_state
from imixer.training.model import (
    build_optimizer,
    catch_up_norms,
    check_image_size,
    create_model,
    load_first_weights,
)
from imixer.training.objective import make_loss
from imixer.training.resuming import restoring
from imixer.training.step import TrainingStep, compile_blocks


class NonFiniteError(RuntimeError):
    """The training loss or its gradient was NaN or infinite in too many updates in a row, or a weight is."""


class Learner:
    """A model with its loss, its optimizer and the average of its weights, on this process's device.

    Args:
        config: The settings.
        data: The images, for the model's inputs and outputs.
        accelerator: Device, precision and processes.
        checkpoint: What `state` gave, to go on from.
        lr: Peak learning rate.

    Attributes:
        plain: The model without the wrapper of data-parallel training, which is tested and saved.
        optimizer: timm's optimizer.
        ema: timm's average of the weights, or None.
        step: What changes the weights.
        notes: What to say about the first weights.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageData,
        accelerator: Accelerator,
        checkpoint: dict[str, Any] | None = None,
        *,
        lr: float,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self._data = data
        self._looked_into: nn.Module | None = None
        self.plain = create_model(config, data, resumed=checkpoint is not None).to(accelerator.device)
        if config.channels_last:
            self.plain = self.plain.to(memory_format=torch.channels_last)
        self.notes: list[str] = []
        if checkpoint is not None:
            with restoring("weights"):
                self.plain.load_state_dict(checkpoint["state_dict"])
        else:
            check_image_size(config, self.plain, data)
            if config.initial_checkpoint:
                self.notes.append(load_first_weights(self.plain, config))
        self.ema = None
        if config.model_ema:
            self.ema = ModelEmaV3(self.plain, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
            if checkpoint is not None and checkpoint["state_dict_ema"] is not None:
                with restoring("averaged weights"):
                    self.ema.module.load_state_dict(checkpoint["state_dict_ema"])
        if config.torchcompile:
            try:
                compile_blocks(self.plain, config.torchcompile, config.torchcompile_mode)
            except RuntimeError as error:  # an unknown backend or mode
                given = f"torchcompile={config.torchcompile!r} and torchcompile_mode={config.torchcompile_mode!r}"
                raise ValueError(f"cannot compile with {given}: {' '.join(str(error).split())}") from error
        self._model = accelerator.prepare_model(self.plain)
        self.optimizer = build_optimizer(config, self.plain, lr=lr)
        scaler = accelerator.scaler
        if checkpoint is not None:
            with restoring("optimizer"):
                load_optimizer(self.plain, self.optimizer, checkpoint["optimizer"], checkpoint["state_dict"])
            if scaler is not None and checkpoint["scaler"] is not None:
                with restoring("gradient scaler"):
                    scaler.load_state_dict(checkpoint["scaler"])
        self.step = TrainingStep(
            self._model,
            make_loss(config).to(accelerator.device),
            self.optimizer,
            plain=self.plain,
            autocast=accelerator.autocast,
            scaler=scaler,
            clip_grad=config.clip_grad,
            ema=self.ema,
            exchange=lambda last: contextlib.nullcontext() if last else accelerator.no_sync(self._model),
            cuda_graph=config.cuda_graph,
        )

    def start_epoch(self) -> None:
        """Make ready for the training part of an epoch."""
        self._model.train()

    def add_gradient(self, images: Tensor, targets: Tensor, *, share: float, last: bool) -> None:
        """Add the gradient of ``share`` of a batch's loss; see :meth:`TrainingStep.add_gradient`."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.step.add_gradient(images, targets, share=share, last=last)

    def end_epoch(self) -> None:
        """Make ready to be tested, with the slow weights of Lookahead, and the running statistics of all processes."""
        if isinstance(self.optimizer, Lookahead):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = parameter.detach()  # those without a gradient are left out
            self.optimizer.sync_lookahead()
            self.optimizer.zero_grad()
        if self.accelerator.num_processes > 1:
            for model in [self.plain] if self.ema is None else [self.plain, self.ema.module]:
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def check_weights(self, epoch: int, folder: Path) -> None:
        """Raise if the updates of an epoch, of gradients that were finite, have made weights infinite or NaN."""
        broken = [name for name, weight in self.plain.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteError(
                f"after epoch {epoch + 1} {len(broken)} weights are not finite, among them {broken[0]}, although all "
                f"gradients were. Try a smaller --lr, a larger --opt-eps, or another --opt; what {folder} "
                "has saved is from before"
            )

    def averaged(self) -> nn.Module | None:
        """The model with averaged weights, ready to be tested; None if there is none."""
        if self.ema is None:
            return None
        averaged: nn.Module = self.ema.module
        catch_up_norms(averaged)
        return averaged

    def whole_model(self) -> nn.Module | None:
        """In the first process the model in float32, not compiled, to be looked into; else None.

        The same model comes back each time, with the weights of the moment.
        """
        first = self.accelerator.is_main_process
        if not (self.config.torchcompile or self.config.amp):
            return self.plain if first else None
        if not first:
            return None
        if self._looked_into is None:
            whole = create_model(self.config, self._data, resumed=True)
            self._looked_into = whole.to(self.accelerator.device)
        self._looked_into.load_state_dict(self.plain.state_dict())
        return self._looked_into

    def state(self) -> dict[str, Any]:
        """Everything that a run goes on from, copied to the host: later updates do not change it.

        All processes have to call it; the first one gets the tensors.
        """
        weights, optimizer = whole_state(self.plain, self.optimizer)
        scaler = self.accelerator.scaler
        state = {
            "state_dict": weights,
            "state_dict_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        # On the CPU the tensors of the state are those of the model; from a device they have been copied.
        on_host = partial(torch.Tensor.to, device="cpu", copy=self.accelerator.device.type == "cpu")
        copied: dict[str, Any] = tree_map_only(Tensor, on_host, state)
        return copied

    def trained(self) -> nn.Module:
        """The model in eval mode, without what mixed precision put on it."""
        model: nn.Module = self.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        return model.eval()
