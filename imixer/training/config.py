"""The settings of a training run, each with its default and its meaning. The command line is made from them."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from accelerate.utils import LoggerType
from timm.optim import list_optimizers

from imixer.imlp_options import IMLP_OPTIONS, choices, complete
from imixer.training.global_batch import cut_into_batches
from imixer.training.keyword_arguments import plain
from imixer.training.ranges import check_ranges

SCHEDULERS = ("cosine", "tanh", "poly", "step", "multistep", "constant")
AMP_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}  # torch's names and accelerate's
AUGMENT_ON = ("workers", "device")
DEVICES = ("auto", "cpu", "cuda")
LR_SCALES = ("linear", "sqrt")
TRACKERS = tuple(str(name) for name in LoggerType.list() if str(name) != "all")
LOOKAHEAD = "lookahead_"  # before the name of an optimizer, as in timm's script
# Settings that are nothing without another one.
NEEDS = {
    "amp_dtype": "amp",
    "bce_target_thresh": "bce_loss",
    "model_ema_decay": "model_ema",
    "model_ema_warmup": "model_ema",
    "torchcompile_mode": "torchcompile",
}
AUGMENTATIONS = (
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
)
# Settings of timm's transforms, which images that are decoded once do not go through.
READ_EVERY_EPOCH = (*AUGMENTATIONS, "train_interpolation", "interpolation", "crop_pct", "mean", "std")


def setting(default: Any, group: str, text: str, **options: Any) -> Any:
    """A field of the configuration: its default, the group that it is listed under, and what it means.

    Args:
        default: Its value unless a preset, a file or a flag sets another.
        group: Heading in the list of flags.
        text: One line of meaning, for the list of flags.
        **options: What the flag needs beyond that: ``metavar``, ``choices``, ``const``, ``aliases``. ``argument`` is
            the keyword argument of timm's ``create_model`` or ``create_optimizer_v2`` that the setting becomes.
    """
    return field(default=default, metadata={"group": group, "text": text, **options})


def imlp_option(name: str) -> Any:
    """The field for an option of the iMLP, as it is declared; None leaves the value to the model."""
    option = IMLP_OPTIONS[name]
    shown = "" if option.default in (None, False) else f" [{option.default}]"
    form = {"choices": choices(name)} if choices(name) else {"metavar": "NAME" if type(option.default) is str else "N"}
    return setting(None, "model", option.meaning + shown, argument=name, **form)


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
    workers: int | None = setting(
        None, "data", "processes that read images [one per core, less one]", metavar="N", aliases=("-j",)
    )

    no_aug: bool = setting(False, "augmentation", "do not augment the training images")
    augment_on: str = setting(
        "workers", "augmentation", "where images that are read in every epoch are augmented", choices=AUGMENT_ON
    )
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
        None, "augmentation", "range of cutmix's side, instead of alpha", metavar="F"
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

    model: str = setting("imixer_ti4_32", "model", "name of a model in timm's registry", metavar="NAME")
    img_size: int | None = setting(None, "model", "height and width of the images", metavar="PX", argument="img_size")
    patch_size: int | None = setting(None, "model", "height and width of a patch", metavar="PX", argument="patch_size")
    num_blocks: int | None = setting(None, "model", "number of mixer blocks", metavar="N", argument="num_blocks")
    embed_dim: int | None = setting(None, "model", "number of channels of a token", metavar="N", argument="embed_dim")
    # The options of an iMLP, declared in imixer/imlp_options.py.
    n_iter: int | None = imlp_option("n_iter")
    solver: str | None = imlp_option("solver")
    backward: str | None = imlp_option("backward")
    rtol: float | None = imlp_option("rtol")
    h_ratio: float | None = imlp_option("h_ratio")
    n_power: int | None = imlp_option("n_power")
    coeff: float | None = imlp_option("coeff")
    hidden_layers: int | None = imlp_option("hidden_layers")
    hidden_solve: str | None = imlp_option("hidden_solve")
    tied: bool | None = imlp_option("tied")
    norm: str | None = imlp_option("norm")
    contraction: str | None = imlp_option("contraction")
    drop: float | None = setting(None, "model", "dropout rate before the classifier", metavar="P", argument="drop_rate")
    drop_path: float | None = setting(
        None, "model", "rate at which stochastic depth skips a block", metavar="P", argument="drop_path_rate"
    )
    model_kwargs: Mapping[str, Any] | None = setting(
        None, "model", "other keyword arguments of the model, such as stem_norm=True", metavar="NAME=VALUE"
    )
    initial_checkpoint: str = setting("", "model", "checkpoint from which training starts", metavar="FILE")
    new_head: bool = setting(False, "model", "leave out its classifier, for other classes")
    new_token_mixing: bool = setting(False, "model", "leave out its token mixers, for another number of patches")

    opt: str = setting(
        "adamw", "optimization", "optimizer, by timm's name, or lookahead_NAME", metavar="NAME", argument="opt"
    )
    opt_eps: float | None = setting(None, "optimization", "its epsilon", metavar="EPS", argument="eps")
    opt_betas: tuple[float, ...] | None = setting(None, "optimization", "its betas", metavar="B", argument="betas")
    opt_kwargs: Mapping[str, Any] | None = setting(
        None, "optimization", "other keyword arguments of the optimizer, such as amsgrad=True", metavar="NAME=VALUE"
    )
    momentum: float = setting(
        0.9, "optimization", "momentum, of optimizers that have one", metavar="M", argument="momentum"
    )
    weight_decay: float = setting(
        0.05, "optimization", "weight decay of matrices; biases have none", metavar="W", argument="weight_decay"
    )
    layer_decay: float | None = setting(
        None, "optimization", "factor of the rate from layer to layer", metavar="F", argument="layer_decay"
    )
    clip_grad: float | None = setting(None, "optimization", "largest norm of the gradient", metavar="NORM")
    grad_accum_steps: int | None = setting(
        None, "optimization", "batches per update [1, or what --global-batch needs]", metavar="N"
    )
    batch_size: int = setting(
        64,
        "optimization",
        "images per batch of each process; with --global-batch at most",
        metavar="N",
        aliases=("-b",),
    )
    global_batch: int | None = setting(
        None, "optimization", "images per update, of all processes together, however many they are", metavar="N"
    )
    validation_batch_size: int | None = setting(
        None, "optimization", "of the test images, if another", metavar="N", aliases=("-vb",)
    )
    epochs: int = setting(60, "optimization", "passes over the images, warm-up included", metavar="N")
    lr: float | None = setting(
        None, "optimization", "peak learning rate, instead of one from --lr-base", metavar="LR", argument="lr"
    )
    lr_base: float = setting(
        3e-3, "optimization", "peak learning rate at --lr-base-size images per update", metavar="LR"
    )
    lr_base_size: int = setting(64, "optimization", "images per update that --lr-base is for", metavar="N")
    lr_base_scale: str | None = setting(
        None,
        "optimization",
        "how the rate grows with the images per update [sqrt for adaptive optimizers, else linear]",
        choices=LR_SCALES,
    )
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
        None, "computation", "compile the blocks", metavar="BACKEND", const="inductor", aliases=("--compile",)
    )
    torchcompile_mode: str | None = setting(None, "computation", "how: reduce-overhead, max-autotune", metavar="MODE")
    cuda_graph: bool = setting(False, "computation", "replay updates as CUDA graphs: one GPU, fixed steps, adam(w)")

    seed: int = setting(42, "run", "seed of weights, order and augmentation", metavar="N")
    output: str | None = setting(None, "run", "folder of the results [runs/<data>-<model>]", metavar="DIR")
    log_interval: int = setting(50, "run", "updates between points of the training curve", metavar="N")
    log_with: tuple[str, ...] = setting(
        ("tensorboard",), "run", "trackers: tensorboard, wandb ... or none", metavar="NAME"
    )
    report_interval: int = setting(10, "run", "epochs between reports on the iMLPs; the last has one", metavar="N")
    checkpoint_interval: str = setting(
        "",
        "run",
        "save within an epoch too: every 500 updates, or every 600s",
        metavar="N",
        aliases=("--recovery-interval",),
    )

    def __post_init__(self) -> None:
        for item in fields(self):  # YAML has lists only
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
            elif isinstance(value, dict):
                object.__setattr__(self, item.name, self._checked_kwargs(item, value))
        imlp_options: Any = {name: getattr(self, name) for name in IMLP_OPTIONS if getattr(self, name) is not None}
        complete(imlp_options)  # raises for values that are not valid
        check_ranges(vars(self))
        self._check_names()
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs counts as part of epochs, but is {self.warmup_epochs} of {self.epochs} epochs"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, which mix pairs, not {self.batch_size}")
        changed = [name for name in self._changed if name in (*READ_EVERY_EPOCH, "augment_on")]
        if self.cache_mb and changed:
            raise ValueError(
                f"{', '.join(changed)}: for images that are read in every epoch, not for those that are decoded once; "
                "add --cache-mb 0, or leave it out"
            )
        if (self.new_head or self.new_token_mixing) and not self.initial_checkpoint:
            raise ValueError("new_head and new_token_mixing leave out parts of --initial-checkpoint; give that too")
        self.checkpoint_every  # noqa: B018  raises for what it cannot read

    @property
    def _changed(self) -> list[str]:
        """The settings that are not what they are by default."""
        return [item.name for item in fields(self) if getattr(self, item.name) != item.default]

    @property
    def without_effect(self) -> list[str]:
        """A line for each setting that changes nothing beside the others."""
        useless = {name: f"without {switch}" for name, switch in NEEDS.items() if not getattr(self, switch)}
        if self.no_aug:
            useless |= dict.fromkeys((*AUGMENTATIONS, "hflip"), "with no_aug")
        return [f"{name} has no effect {useless[name]}" for name in self._changed if name in useless]

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

    def batches(self, world_size: int) -> tuple[int, int]:
        """Return the images per batch of each of so many processes, and the batches per update."""
        if self.global_batch is None:
            return self.batch_size, self.grad_accum_steps or 1
        return cut_into_batches(
            self.global_batch, world_size, at_most=self.batch_size, batches=self.grad_accum_steps, even=self.mixes
        )

    def peak_lr(self, images: int) -> float:
        """Return the peak learning rate for so many images per update: `lr`, or `lr_base` scaled as timm does."""
        if self.lr is not None:
            return self.lr
        return self.lr_base * (images / self.lr_base_size) ** (0.5 if self.lr_scale == "sqrt" else 1)

    @property
    def lr_scale(self) -> str:
        """How the rate grows with the images per update: as given, or timm's choice for the optimizer."""
        adaptive = any(part in self.opt.lower() for part in ("ada", "lamb"))
        return self.lr_base_scale or ("sqrt" if adaptive else "linear")

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``timm.create_model`` that are set."""
        return {**self._arguments("model"), **(self.model_kwargs or {})}

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``timm.optim.create_optimizer_v2`` that are set."""
        return {**self._arguments("optimization"), **(self.opt_kwargs or {})}

    def advice(self, group: str) -> str:
        """The flags that set keyword arguments of a group, as the end of an error about them."""
        names = [item.name for item in arguments_of_group(group).values()]
        names.append("model_kwargs" if group == "model" else "opt_kwargs")
        flags = [f"--{name.replace('_', '-')}" for name in names if name in self._changed]
        return f"; change {' or '.join(flags)}" if flags else ""

    def _arguments(self, group: str) -> dict[str, Any]:
        named = {argument: getattr(self, item.name) for argument, item in arguments_of_group(group).items()}
        return {argument: value for argument, value in named.items() if value is not None}

    def _checked_kwargs(self, item: "Field[Any]", kwargs: dict[str, Any]) -> dict[str, Any]:
        flags = {argument: f"--{named.name}" for argument, named in arguments_of_group(item.metadata["group"]).items()}
        flags |= {"num_classes": "--num-classes", "checkpoint_path": "--initial-checkpoint"}
        for name, value in kwargs.items():
            if name == "in_chans":
                raise ValueError(f"{item.name} sets in_chans, which the images decide; leave it out")
            if name in flags:
                flag = flags[name].replace("_", "-")
                raise ValueError(f"{item.name} sets {name} to {value!r}, which has a flag of its own: use {flag}")
        return {name: plain(value, f"{name} in {item.name}") for name, value in kwargs.items()}

    def _check_names(self) -> None:
        choices: dict[str, Collection[str]] = {
            item.name: item.metadata["choices"] for item in fields(self) if "choices" in item.metadata
        }
        choices["opt"] = [str(name) for name in list_optimizers()]
        for name, known in choices.items():
            value = getattr(self, name)
            if name == "opt":
                value = value.removeprefix(LOOKAHEAD)
            if value is not None and value not in known:
                near = difflib.get_close_matches(value, known, n=5) if len(known) > 10 else []
                raise ValueError(f"{name} {value!r} is unknown; known are {', '.join(near or known)}")
        for name in self.log_with:
            if name not in TRACKERS and self.log_with != ("none",):
                raise ValueError(
                    f"log_with {name!r} is unknown; known are {', '.join(TRACKERS)}, or none alone; a DATA_DIR comes "
                    "before this flag"
                )


def arguments_of_group(group: str) -> dict[str, "Field[Any]"]:
    """The fields of a group that become keyword arguments, by argument."""
    listed = [item for item in fields(TrainingConfig) if item.metadata["group"] == group]
    return {item.metadata["argument"]: item for item in listed if "argument" in item.metadata}
