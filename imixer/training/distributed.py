"""One process or many: accelerate's devices, precision and data parallelism; PyTorch's FSDP2; state that fits both.

The processes come from ``torchrun`` or ``accelerate launch``; nothing here starts one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from imixer.training.config import AMP_DTYPES, TrainingConfig

OPTIMIZER_SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "fused", "capturable")


def choose_device(name: str) -> torch.device:
    """The device of a name in `DEVICES`; "auto" is CUDA where there is one.

    Raises:
        ValueError: The device is missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here: torch.cuda.is_available() is False; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Set up device, precision and process group.

    Raises:
        ValueError: The device is missing, or cannot do what is asked for.
    """
    on_cpu = choose_device(config.device).type == "cpu"
    precision = amp_dtype(config, on_cpu)
    if precision == "float16" and on_cpu:
        raise ValueError("amp_dtype float16 needs a CUDA device; on the CPU use --amp-dtype bfloat16")
    if precision == "float16" and config.fsdp:
        raise ValueError("amp_dtype float16 and fsdp do not go together; with --fsdp use --amp-dtype bfloat16")
    if config.fsdp and config.model_ema:
        raise ValueError("model_ema holds a whole copy of the weights, and fsdp shards them; leave one of the two out")
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=AMP_DTYPES[precision] if precision else "no")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"accelerate was configured for {accelerator.distributed_type.value}; here it starts the processes alone: "
            "launch with --multi_gpu, and give --fsdp to the script to shard the model"
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise ValueError("fsdp shards over processes, and there is one; start several with torchrun, or leave it out")
    return accelerator


def amp_dtype(config: TrainingConfig, on_cpu: bool) -> str | None:
    """torch's name of the lower precision of mixed precision, or None without it."""
    return (config.amp_dtype or ("bfloat16" if on_cpu else "float16")) if config.amp else None


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a model's parameters over all processes (FSDP2), block by block, in place.

    Only the block that computes has its whole weights in memory. Weights are gathered in float32 and rounded by
    autocast where they are used, as without sharding: the spectral norms see them whole and exact.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def accumulating(model: nn.Module, accelerator: Accelerator, *, only: bool) -> Iterator[None]:
    """Inside, if ``only``, processes add up their own gradients alone; a later backward pass exchanges the sums."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not only)
        yield
    else:
        with accelerator.no_sync(model) if only else contextlib.nullcontext():
            yield


def whole_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts of model and optimizer, whole and by parameter names, whatever shards or wraps them.

    All processes have to call it; the first one gets the tensors, on the CPU.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not optimizer.state:  # before the first step there is none; PyTorch would take one to have some
        return weights, {}
    return weights, get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the state that `whole_state` took, also from another number of processes.

    Its settings stay: a run may go on with others.
    """
    if not state:
        return
    options = StateDictOptions(full_state_dict=True)
    groups: Any = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    for group, saved in zip(groups, state["param_groups"], strict=True):
        # What is no setting is state that some optimizers keep here.
        group.update({name: saved[name] for name in group if name in saved and name not in OPTIMIZER_SETTINGS})
    set_optimizer_state_dict(model, optimizer, {**state, "param_groups": groups}, options=options)
