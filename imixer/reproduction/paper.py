"""The tables and figures of the paper as experiments."""

from collections.abc import Sequence

from imixer.reproduction.data_sets import DIGITS, DataSet
from imixer.reproduction.experiments import Arm, Experiment
from imixer.reproduction.scales import SIZES, Scale

# Top-1 accuracies of iMixers on CIFAR-10 in Table 1, h_ratio 2 and two steps.
PUBLISHED = {"S": 88.56, "B": 89.07, "L": 87.48}
# The value of the model's `norm` for batch normalization with statistics of its own in every step of the solve.
BATCH_NORM_IN_EVERY_STEP = "batch_per_step"
NORMS = {"SpecNorm": "spectral", "none": "none", "BatchNorm in every step": BATCH_NORM_IN_EVERY_STEP}


def table1(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Mixer against iMixer in three sizes."""
    data = data_sets[0]
    arms = []
    for size in SIZES:
        mixer = {"size": size, "model": "Mixer"}
        published = PUBLISHED[size] if scale.name == "paper" and data.name == "cifar10" else None
        arms += [
            Arm(labels=mixer, data=data, settings=scale.mixer(data, size)),
            Arm(
                labels={"size": size, "model": "iMixer"},
                data=data,
                settings=scale.imixer(data, size),
                baseline=mixer,
                published=published,
            ),
        ]
    return Experiment(
        name="table1",
        title="Table 1: Mixer and iMixer",
        question="Is an iMixer at least as good as timm's Mixer of the same blocks, width and patches under the same "
        "recipe? iMixers have h_ratio 2 and take two steps.",
        arms=tuple(arms),
    )


def table2(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """The grid of h_ratio and n_iter."""
    data = data_sets[0]
    baseline = {"h_ratio": "2", "n_iter": "2"}
    arms = []
    for h_ratio in scale.h_ratios:
        for n_iter in scale.n_iters:
            labels = {"h_ratio": f"{h_ratio:g}", "n_iter": str(n_iter)}
            arms.append(
                Arm(
                    labels=labels,
                    data=data,
                    settings=scale.imixer(data, h_ratio=h_ratio, n_iter=n_iter),
                    baseline=None if labels == baseline else baseline,
                )
            )
    return Experiment(
        name="table2",
        title="Table 2: inner width and number of steps",
        question="How does the accuracy depend on the width of the inner layers (h_ratio) and on the number of steps "
        "(n_iter) of an iMixer? The paper finds little difference between 1, 2 and 4 steps.",
        arms=tuple(arms),
    )


def table3(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Spectral normalization, none, or batch normalization."""
    data = data_sets[0]
    arms = []
    for n_iter in scale.n_iters:
        baseline = {"norm": "SpecNorm", "n_iter": str(n_iter)}
        for label, norm in NORMS.items():
            changes = {} if norm == "spectral" else {"norm": norm}  # so that Table 2's trials serve here too
            arms.append(
                Arm(
                    labels={"norm": label, "n_iter": str(n_iter)},
                    data=data,
                    settings=scale.imixer(data, n_iter=n_iter, **changes),
                    baseline=None if norm == "spectral" else baseline,
                )
            )
    return Experiment(
        name="table3",
        title="Table 3: normalization in the map",
        question="Is spectral normalization needed as the number of steps grows, and is batch normalization in every "
        "step worse? Each norm is compared with SpecNorm at the same number of steps.",
        arms=tuple(arms),
    )


def table4(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Mixer against iMixer on several data sets."""
    found = [*data_sets, *([DIGITS] if scale.digits_in_table4 and DIGITS not in data_sets else [])]
    arms = []
    for data in found:
        mixer = {"data": data.name, "model": "Mixer"}
        arms += [
            Arm(labels=mixer, data=data, settings=scale.mixer(data)),
            Arm(labels={"data": data.name, "model": "iMixer"}, data=data, settings=scale.imixer(data), baseline=mixer),
        ]
    names = {data.name for data in found}
    missing = [name for name in ("cifar100", "stanford_cars", "food101", "imagenet") if name not in names]
    return Experiment(
        name="table4",
        title="Table 4: data sets",
        question="Does the comparison of Mixer and iMixer hold on other data sets?",
        arms=tuple(arms),
        left_out=tuple((name, "it is not in the folder of the data") for name in missing),
    )


def figure3(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """The iteration's steps and directions, of all layers."""
    return Experiment(
        name="figure3",
        title="Figures 3 and C.3: does the iteration converge?",
        question="On 16 test images, the norm of z(k+1) - z(k) over the size of z, and the cosine similarity of z(k) "
        "and z(k+1), against k, for models trained with different numbers of steps: the mean over all layers "
        "(Figure 3), and each layer (C.3).",
        arms=steps_of_training(scale, data_sets[0]),
        measurements=("iteration",),
    )


def feature_maps(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Pictures of the feature maps along the iteration."""
    return Experiment(
        name="feature-maps",
        title="Figure C.4: feature maps along the iteration",
        question="What the first block's token mixer returns for a test image if its solve is stopped after k steps, "
        "for some channels: fc2(act(z(k))) as an image of the tokens.",
        arms=steps_of_training(scale, data_sets[0]),
        measurements=("feature-maps",),
    )


def steps_of_training(scale: Scale, data: DataSet) -> tuple[Arm, ...]:
    """Models trained with different numbers of steps, those of Table 2."""
    baseline = {"n_iter": "2"}
    return tuple(
        Arm(
            labels={"n_iter": str(n_iter)},
            data=data,
            settings=scale.imixer(data, n_iter=n_iter),
            baseline=None if n_iter == 2 else baseline,
        )
        for n_iter in scale.n_iters
        if n_iter <= 4
    )
