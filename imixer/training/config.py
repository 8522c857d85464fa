"""The settings of a training run, each with its default and its meaning. The command line is made from them."""

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from timm.optim import list_optimizers

SCHEDULERS = ("cosine", "tanh", "poly", "step", "multistep", "constant")
AMP_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}  # torch's names and accelerate's
DEVICES = ("auto", "cpu", "cuda")
# Settings of timm's transforms, which images that are decoded once do not go through.
READ_EVERY_EPOCH = (
    "train_crop_mode",
    "scale",
    "ratio",
    "vflip",
    "color_jitter",
    "color_jitter_prob",
    "grayscale_prob",
    "gaussian_blur_prob",
    "aa",
    "reprob",
    "remode",
    "recount",
    "train_interpolation",
    "interpolation",
    "crop_pct",
    "mean",
    "std",
)


def setting(default: Any, group: str, text: str, **options: Any) -> Any:
    """A field of the configuration: its default, the group that it is listed under, and what it means.

    Args:
        default: Its value unless a preset, a file or a flag sets another.
        group: Heading in the list of flags.
        text: One line of meaning, for the list of flags.
        **options: What the flag needs beyond that: ``metavar``, ``choices``, ``const``, ``aliases``.
    """
    return field(default=default, metadata={"group": group, "text": text, **options})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that a training run depends on, besides the images. What a field means stands beside it.

    Names are those of timm's ``train.py``, and so are the defaults, but for the model, the optimizer and what the
    published command states itself: there they are a recipe for small images. None leaves it to the model or the data.

    Raises:
        ValueError: A value is out of its range.
    """

    data_dir: str | None = setting(
        None, "data", "folder of the images; without it, scikit-learn's digits", metavar="DIR"
    )
    dataset: str = setting(
        "", "data", "timm's name of the data set, such as torch/cifar10; empty: a folder of images", metavar="NAME"
    )
    train_split: str = setting("train", "data", "split to train on", metavar="NAME")
    val_split: str = setting("validation", "data", "split to test on", metavar="NAME")
    dataset_download: bool = setting(False, "data", "download the data set if it is not there", aliases=("--download",))
    num_classes: int | None = setting(None, "data", "number of classes; refused if the data has another", metavar="N")
    cache_mb: int = setting(
        0, "data", "decode all images once if they fit in this memory; 0: read them in every epoch", metavar="MIB"
    )
    workers: int = setting(4, "data", "processes that read images from disk", metavar="N", aliases=("-j",))

    no_aug: bool = setting(False, "augmentation", "do not augment the training images")
    train_crop_mode: str | None = setting(
        None, "augmentation", "how training images are cropped: rrc, rkrc, rkrr", metavar="MODE"
    )
    scale: tuple[float, ...] = setting((0.08, 1.0), "augmentation", "range of the random crop's area", metavar="F")
    ratio: tuple[float, ...] = setting(
        (3 / 4, 4 / 3), "augmentation", "range of the random crop's aspect ratio", metavar="F"
    )
    hflip: float = setting(0.5, "augmentation", "probability of mirroring left and right", metavar="P")
    vflip: float = setting(0.0, "augmentation", "probability of mirroring up and down", metavar="P")
    color_jitter: float = setting(0.4, "augmentation", "strength of color jitter, without --aa", metavar="F")
    color_jitter_prob: float | None = setting(None, "augmentation", "probability of it", metavar="P")
    grayscale_prob: float = setting(0.0, "augmentation", "probability of taking the colors away", metavar="P")
    gaussian_blur_prob: float = setting(0.0, "augmentation", "probability of blurring", metavar="P")
    aa: str | None = setting(None, "augmentation", "policy such as rand-m9-mstd0.5-inc1", metavar="POLICY")
    reprob: float = setting(0.0, "augmentation", "probability of random erasing", metavar="P")
    remode: str = setting("pixel", "augmentation", "what is put there", choices=("const", "rand", "pixel"))
    recount: int = setting(1, "augmentation", "rectangles to erase", metavar="N")
    mixup: float = setting(0.0, "augmentation", "alpha of mixup; 0: none", metavar="A")
    cutmix: float = setting(0.0, "augmentation", "alpha of cutmix; 0: none", metavar="A")
    cutmix_minmax: tuple[float, ...] | None = setting(
        None, "augmentation", "range of cutmix's side, in the place of alpha", metavar="F"
    )
    mixup_prob: float = setting(1.0, "augmentation", "probability of either on a batch", metavar="P")
    mixup_switch_prob: float = setting(0.5, "augmentation", "probability of cutmix when both are on", metavar="P")
    mixup_mode: str = setting("batch", "augmentation", "what is mixed alike", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(0, "augmentation", "epoch from which nothing is mixed; 0: never", metavar="N")
    smoothing: float = setting(0.1, "augmentation", "label smoothing", metavar="S")
    train_interpolation: str = setting("random", "augmentation", "interpolation of training images", metavar="NAME")
    interpolation: str = setting("", "augmentation", "of test images; empty: the model's own", metavar="NAME")
    crop_pct: float | None = setting(None, "augmentation", "part of a test image that is kept", metavar="F")
    mean: tuple[float, ...] | None = setting(
        None, "augmentation", "mean of a channel, of images in [0, 1]", metavar="F"
    )
    std: tuple[float, ...] | None = setting(None, "augmentation", "standard deviation of a channel", metavar="F")

    model: str = setting("imixer_ti4_32", "model", "name in timm's registry", metavar="NAME")
    img_size: int | None = setting(None, "model", "side of the images", metavar="PX")
    patch_size: int | None = setting(None, "model", "side of a patch", metavar="PX")
    num_blocks: int | None = setting(None, "model", "number of mixer blocks", metavar="N")
    embed_dim: int | None = setting(None, "model", "channels of a token", metavar="N")
    h_ratio: float | None = setting(None, "model", "inner width of the iMLP's map over its state's", metavar="R")
    n_iter: int | None = setting(None, "model", "solver steps (at most, with --rtol)", metavar="N")
    n_power: int | None = setting(None, "model", "power iterations of the spectral normalization", metavar="N")
    coeff: float | None = setting(None, "model", "bound on the spectral norm of the map's weights", metavar="C")
    solver: str | None = setting(None, "model", "fixed-point solver: picard, anderson, broyden ...", metavar="NAME")
    backward: str | None = setting(None, "model", "gradient of the fixed point: unrolled, implicit ...", metavar="NAME")
    rtol: float | None = setting(None, "model", "relative tolerance that ends a solve early", metavar="TOL")
    hidden_layers: int | None = setting(None, "model", "hidden layers of each iMLP; 1: MLP-Mixer", metavar="N")
    hidden_solve: str | None = setting(None, "model", "how many of them are solved for: nested, joint", metavar="NAME")
    tied: bool | None = setting(None, "model", "make the iMLP's couplings symmetric")
    norm: str | None = setting(None, "model", "normalization in the map: spectral, none, batch ...", metavar="NAME")
    contraction: str | None = setting(None, "model", "paper, or certified for a map that contracts", metavar="NAME")
    drop: float | None = setting(None, "model", "dropout rate", metavar="P")
    drop_path: float | None = setting(None, "model", "stochastic depth rate", metavar="P")
    initial_checkpoint: str = setting("", "model", "checkpoint to take the first weights from", metavar="FILE")
    new_head: bool = setting(False, "model", "leave out its classifier, for other classes")
    new_token_mixing: bool = setting(False, "model", "leave out its token mixers, for another number of patches")

    opt: str = setting("adamw", "optimization", "optimizer, by timm's name", metavar="NAME")
    opt_eps: float | None = setting(None, "optimization", "its epsilon", metavar="EPS")
    opt_betas: tuple[float, ...] | None = setting(None, "optimization", "its betas", metavar="B")
    momentum: float = setting(0.9, "optimization", "momentum, of optimizers that have one", metavar="M")
    weight_decay: float = setting(0.05, "optimization", "weight decay of matrices; biases have none", metavar="W")
    layer_decay: float | None = setting(None, "optimization", "factor of the rate from layer to layer", metavar="F")
    clip_grad: float | None = setting(None, "optimization", "largest norm of the gradient", metavar="NORM")
    grad_accum_steps: int = setting(1, "optimization", "batches to an update", metavar="N")
    batch_size: int = setting(64, "optimization", "images to a batch, of each process", metavar="N", aliases=("-b",))
    validation_batch_size: int | None = setting(
        None, "optimization", "of the test images, if another", metavar="N", aliases=("-vb",)
    )
    epochs: int = setting(60, "optimization", "passes over the images, warm-up included", metavar="N")
    lr: float = setting(3e-3, "optimization", "peak learning rate", metavar="LR")
    sched: str = setting("cosine", "optimization", "learning rate schedule", choices=SCHEDULERS)
    sched_on_updates: bool = setting(False, "optimization", "change the rate at every update, not every epoch")
    min_lr: float = setting(0.0, "optimization", "rate at the schedule's end", metavar="LR")
    warmup_lr: float = setting(1e-5, "optimization", "rate that the warm-up starts from", metavar="LR")
    warmup_epochs: int = setting(5, "optimization", "epochs of warm-up", metavar="N")
    cooldown_epochs: int = setting(0, "optimization", "epochs at the last rate, after the others", metavar="N")
    decay_epochs: float = setting(90, "optimization", "epochs between the falls of --sched step", metavar="N")
    decay_milestones: tuple[int, ...] = setting(
        (90, 180, 270), "optimization", "epochs of the falls of --sched multistep", metavar="N"
    )
    decay_rate: float = setting(0.1, "optimization", "factor of such a fall; power of --sched poly", metavar="F")
    bce_loss: bool = setting(False, "optimization", "binary cross-entropy in the place of cross-entropy")
    bce_target_thresh: float | None = setting(None, "optimization", "soft targets above it become 1", metavar="T")
    model_ema: bool = setting(False, "optimization", "average the weights, and test the average")
    model_ema_decay: float = setting(0.9998, "optimization", "decay of that average", metavar="D")
    model_ema_warmup: bool = setting(False, "optimization", "let the decay grow to that value")
    max_nonfinite: int = setting(
        10,
        "optimization",
        "updates in a row with a loss or gradient that is not finite, until the run stops",
        metavar="N",
    )

    device: str = setting("auto", "computation", "where to compute; auto prefers CUDA", choices=DEVICES)
    amp: bool = setting(False, "computation", "compute in mixed precision")
    amp_dtype: str | None = setting(
        None, "computation", "its lower precision [float16 on CUDA, bfloat16 on the CPU]", choices=tuple(AMP_DTYPES)
    )
    tf32: bool = setting(False, "computation", "let CUDA's float32 matrix products round to TF32")
    channels_last: bool = setting(False, "computation", "keep channels last in memory")
    torchcompile: str | None = setting(
        None, "computation", "compile the model", metavar="BACKEND", const="inductor", aliases=("--compile",)
    )
    torchcompile_mode: str | None = setting(None, "computation", "how: reduce-overhead, max-autotune", metavar="MODE")

    seed: int = setting(42, "run", "seed of weights, order and augmentation", metavar="N")
    output: str | None = setting(None, "run", "folder of the results [runs/<data>-<model>]", metavar="DIR")
    log_interval: int = setting(50, "run", "updates between points of the training curve", metavar="N")
    checkpoint_interval: str = setting(
        "",
        "run",
        "save within an epoch too: every 500 updates, or every 600s",
        metavar="N",
        aliases=("--recovery-interval",),
    )

    def __post_init__(self) -> None:
        for item in fields(self):  # YAML has lists alone
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
        self._check_numbers()
        self._check_names()
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs counts as part of epochs, but is {self.warmup_epochs} of {self.epochs} epochs"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, which mix pairs, not {self.batch_size}")
        changed = [item.name for item in fields(self) if item.name in READ_EVERY_EPOCH]
        changed = [name for name in changed if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.cache_mb and changed:
            raise ValueError(
                f"{', '.join(changed)}: for images that are read in every epoch, not for those that are decoded once; "
                "add --cache-mb 0, or leave it out"
            )
        if (self.new_head or self.new_token_mixing) and not self.initial_checkpoint:
            raise ValueError("new_head and new_token_mixing leave out parts of --initial-checkpoint; give that too")
        self.checkpoint_every  # noqa: B018  raises for what it cannot read

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def checkpoint_every(self) -> tuple[float, float]:
        """Updates and seconds between checkpoints within an epoch; what is not set is infinite."""
        text = self.checkpoint_interval
        number, unit = (text[:-1], "s") if text.endswith("s") else (text, "")
        try:
            value = float(number) if text else math.inf
        except ValueError:
            value = 0.0
        if not value > 0:
            raise ValueError(f"checkpoint_interval must be updates such as 500 or seconds such as 600s, not {text!r}")
        return (math.inf, value) if unit else (value, math.inf)

    def _check_numbers(self) -> None:
        at_least_1 = ("num_classes", "img_size", "patch_size", "num_blocks", "embed_dim", "hidden_layers", "epochs")
        for name in (
            *at_least_1,
            "batch_size",
            "validation_batch_size",
            "grad_accum_steps",
            "log_interval",
            "max_nonfinite",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        not_negative = ("workers", "cache_mb", "seed", "weight_decay", "clip_grad", "warmup_epochs", "cooldown_epochs")
        for name in (*not_negative, "warmup_lr", "min_lr", "mixup", "cutmix"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        for name in ("smoothing", "drop", "drop_path", "model_ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, not {self.lr}")

    def _check_names(self) -> None:
        choices: dict[str, Collection[str]] = {
            item.name: item.metadata["choices"] for item in fields(self) if "choices" in item.metadata
        }
        choices["opt"] = [str(name) for name in list_optimizers()]
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                near = difflib.get_close_matches(value, known, n=5) if len(known) > 10 else []
                raise ValueError(f"{name} {value!r} is unknown; known are {', '.join(near or known)}")
