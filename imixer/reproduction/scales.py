"""Three scales to run the experiments at: in a minute, in hours on two cores, and as in the paper.

A scale was chosen before any of its experiments ran, and is the same for all arms of an experiment.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imixer.reproduction.data_sets import DataSet
from imixer.training import PRESETS

SIZES = ("S", "B", "L")
# Settings of the paper's presets that a plain Mixer does not have.
OF_THE_IMLP = ("h_ratio", "n_iter", "n_power")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are.

    Args:
        name: Its name.
        training: Settings of all trainings.
        sizes: Settings of each model size on top, the model's name left out.
        imixers: Name of the iMixer of each size.
        mixers: Name of timm's Mixer of each size.
        default_size: The size of the experiments that have only one.
        seeds: Number of seeds.
        h_ratios: The grid of Table 2.
        n_iters: Numbers of steps of Tables 2 and 3, Figure 3 and the inference steps.
        solver_training: Settings on top in the ablation of solvers, which has many arms.
        solver_seeds: Number of seeds in that ablation.
        fixed_steps: Numbers of Picard steps in that ablation.
        solvers: Its solvers that go on to a tolerance.
        test_steps: Numbers of steps that trained models are tested with.
        digits: Settings on top for scikit-learn's digits, which are few and small.
        digits_in_table4: Whether Table 4 has the digits in addition to the data sets that are found.
    """

    name: str
    training: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]
    imixers: Mapping[str, str]
    mixers: Mapping[str, str]
    default_size: str
    seeds: int
    h_ratios: tuple[float, ...]
    n_iters: tuple[int, ...]
    solver_training: Mapping[str, Any]
    solver_seeds: int
    fixed_steps: tuple[int, ...] = (1, 2, 4, 8)
    solvers: tuple[str, ...] = ("picard", "anderson", "broyden", "auto")
    test_steps: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 16)
    digits: Mapping[str, Any] = field(default_factory=dict)
    digits_in_table4: bool = True

    def imixer(self, data: DataSet, size: str | None = None, **changes: Any) -> dict[str, Any]:
        """Settings of an iMixer's training, the paper's by default: two hidden layers, h_ratio 2, two steps."""
        size = size or self.default_size
        chosen = {"h_ratio": 2.0, "n_iter": 2, "n_power": 8} | changes
        return self._settings(data, size) | {"model": self.imixers[size]} | chosen

    def mixer(self, data: DataSet, size: str | None = None) -> dict[str, Any]:
        """Settings of the training of timm's Mixer of the same size."""
        size = size or self.default_size
        settings = self._settings(data, size) | {"model": self.mixers[size]}
        return {name: value for name, value in settings.items() if name not in OF_THE_IMLP}

    def _settings(self, data: DataSet, size: str) -> dict[str, Any]:
        settings = {**self.training, **self.sizes[size], **data.reading}
        return {**settings, **self.digits} if data.data_dir is None else settings


# A recipe for small images that are held in memory.
_SMALL: dict[str, Any] = {
    "opt": "adamw",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "sched": "cosine",
    "sched_on_updates": True,
    "warmup_epochs": 0,
    "min_lr": 1e-5,
    "batch_size": 128,
    "smoothing": 0.1,
    "cache_mb": 512,
}
_TI_NAMES: dict[str, Any] = {
    "imixers": dict.fromkeys(SIZES, "imixer_ti4_32"),
    "mixers": dict.fromkeys(SIZES, "mixer_ti4_32"),
}


def _of_the_paper(size: str) -> dict[str, Any]:
    preset = PRESETS[f"paper-{size}"]
    return {name: value for name, value in preset.items() if name not in ("model", "dataset", "num_classes")}


SCALES = {
    "smoke": Scale(
        name="smoke",
        training={**_SMALL, "epochs": 1, "batch_size": 64, "lr": 1e-2},
        sizes={
            "S": {"num_blocks": 1, "embed_dim": 16},
            "B": {"num_blocks": 2, "embed_dim": 16},
            "L": {"num_blocks": 2, "embed_dim": 24},
        },
        **_TI_NAMES,
        default_size="B",
        seeds=2,
        h_ratios=(1.0, 2.0),
        n_iters=(1, 2, 4),
        solver_training={"num_blocks": 1},
        solver_seeds=2,
        fixed_steps=(2,),
        solvers=("picard", "broyden"),
        test_steps=(1, 2, 4, 8),
    ),
    "cpu": Scale(
        name="cpu",
        training={**_SMALL, "epochs": 3},
        sizes={
            "S": {"num_blocks": 2, "embed_dim": 32},
            "B": {"num_blocks": 3, "embed_dim": 48},
            "L": {"num_blocks": 4, "embed_dim": 64},
        },
        **_TI_NAMES,
        default_size="B",
        seeds=4,
        h_ratios=(1.0, 2.0, 4.0),
        n_iters=(1, 2, 4),
        solver_training={"num_blocks": 2, "embed_dim": 32, "patch_size": 8, "epochs": 1},
        solver_seeds=3,
        digits={"epochs": 60, "patch_size": 2, "batch_size": 64},
    ),
    "paper": Scale(
        name="paper",
        training={},
        sizes={"S": _of_the_paper("small"), "B": _of_the_paper("base"), "L": _of_the_paper("large")},
        imixers={"S": "imixer_s16_224", "B": "imixer_b16_224", "L": "imixer_l16_224"},
        mixers={"S": "mixer_s16_224", "B": "mixer_b16_224", "L": "mixer_l16_224"},
        default_size="S",
        seeds=10,
        h_ratios=(0.5, 1.0, 2.0, 4.0),
        n_iters=(1, 2, 4, 8),
        solver_training={},
        solver_seeds=3,
        digits_in_table4=False,
    ),
}
