"""One process or many: accelerate's devices, precision and data parallelism.

The processes come from ``torchrun``, ``accelerate launch`` or SLURM's ``srun``; nothing here starts one.
"""

import os
import re
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from imixer.training.config import AMP_DTYPES, TrainingConfig

Result = TypeVar("Result")
OPTIMIZER_SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "fused", "capturable")
# What srun tells every task of its step.
SLURM_STEP = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
)


def choose_device(name: str) -> torch.device:
    """The device of a name in `DEVICES`; "auto" is CUDA where there is one.

    Raises:
        ValueError: The device is missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here: torch.cuda.is_available() is False; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def join_slurm_step(environ: MutableMapping[str, str]) -> None:
    """Let the tasks that ``srun`` started find each other as the processes of ``torchrun`` do.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT by SLURM's variables of the step.
    Does nothing where they are set, as by ``torchrun``, or where there is one task. The first host of the step is the
    master, and its port follows from the numbers of job and step; one that is set stays.

    Args:
        environ: The variables, such as `os.environ`, which are changed in place.

    Raises:
        ValueError: SLURM's variables are not whole; the message says what to do.
    """
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    lacking = [name for name in SLURM_STEP if not environ.get(name)]
    if lacking:
        raise ValueError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but {', '.join(lacking)} is not set, so that they "
            "cannot find each other; start one task on each node, which runs torchrun, or set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    # "gpu[003-008,12],login" stands for gpu003 and others, "4(x2),3" for 4, 4 and 3 tasks.
    hosts = re.findall(r"(?:[^\[,]|\[[^\]]*\])+", environ["SLURM_STEP_NODELIST"])
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    port = 15000 + (int(environ["SLURM_JOB_ID"]) + 997 * int(environ["SLURM_STEP_ID"])) % 17000
    environ.setdefault("MASTER_ADDR", re.sub(r"\[(\d+)[^\]]*\]", r"\1", hosts[0]))
    environ.setdefault("MASTER_PORT", str(port))
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_WORLD_SIZE"] = str(tasks[int(environ["SLURM_NODEID"])])
    # --gpus-per-task=1 shows each task only its own GPU.
    environ["LOCAL_RANK"] = "0" if torch.cuda.device_count() == 1 else environ["SLURM_LOCALID"]
    environ["RANK"] = environ["SLURM_PROCID"]


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Set up device, precision and process group.

    Raises:
        ValueError: The device is missing, or cannot do what is asked for.
    """
    join_slurm_step(os.environ)
    on_cpu = choose_device(config.device).type == "cpu"
    precision = amp_dtype(config, on_cpu)
    if precision == "float16" and on_cpu:
        raise ValueError("amp_dtype float16 needs a CUDA device; on the CPU use --amp-dtype bfloat16")
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=AMP_DTYPES[precision] if precision else "no")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, and the training is data-parallel: "
            "every process holds the whole model. Launch with --multi_gpu"
        )
    return accelerator


def amp_dtype(config: TrainingConfig, on_cpu: bool) -> str | None:
    """torch's name of the lower precision of mixed precision, or None without it."""
    return (config.amp_dtype or ("bfloat16" if on_cpu else "float16")) if config.amp else None


def from_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something in the first process; return what came of it, or raise what went wrong there, in all of them."""
    agreed: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            agreed[0] = work()
        except (ValueError, OSError) as error:
            agreed[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(agreed)
    if isinstance(agreed[0], Exception):
        raise agreed[0]
    result: Result = agreed[0]
    return result


def whole_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts of model and optimizer by parameter names, whatever wraps them.

    All processes have to call it; the first one gets the tensors, on the CPU.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # Lookahead keeps its state there
    if not optimizer.state:  # before the first step there is none; PyTorch would take one to have some
        return weights, {}
    return weights, get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], weights: dict[str, Any]) -> None:
    """Give an optimizer the state that `whole_state` took with the weights, also from another number of processes.

    Its settings stay: a run may go on with others, and with other groups of parameters, as timm makes them without
    weight decay.
    """
    if not state:
        return
    options = StateDictOptions(full_state_dict=True)
    base = getattr(optimizer, "_base_optimizer", optimizer)
    # To have a state, PyTorch takes a step with zero gradients and rate, in which some optimizers move the weights.
    groups: Any = get_optimizer_state_dict(model, base, options=options)["param_groups"]
    before = {parameter: group for group in state["param_groups"] for parameter in group["params"]}
    for group in groups:
        saved = before[group["params"][0]] if group["params"] else {}
        # What is no setting is state that some optimizers keep here.
        group.update({name: saved[name] for name in group if name in saved and name not in OPTIMIZER_SETTINGS})
    set_optimizer_state_dict(model, base, {**state, "param_groups": groups}, options=options)
    optimizer.param_groups = base.param_groups
    model.load_state_dict(weights)
