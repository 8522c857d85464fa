"""The library's own experiments: solvers and backward modes, depth, steps at test time, certified contraction."""

from collections.abc import Sequence
from typing import Any

from imixer.imlp import IMLP
from imixer.reproduction.data_sets import DataSet
from imixer.reproduction.experiments import Arm, Experiment
from imixer.reproduction.paper import steps_of_training
from imixer.reproduction.scales import Scale

BACKWARDS = ("unrolled", "checkpointed", "implicit", "phantom", "jfb", "neumann", "shine")
RTOL, MAX_STEPS = 1e-3, 30


def solvers(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Every solver with every backward mode that can go with it."""
    data = data_sets[0]
    changes = {name: value for name, value in scale.solver_training.items() if data.data_dir or name != "patch_size"}
    solves: dict[str, dict[str, Any]] = {
        f"picard, {steps} step" + "s" * (steps > 1): {"solver": "picard", "n_iter": steps}
        for steps in scale.fixed_steps
    }
    solves |= {f"{name} to {RTOL:g}": {"solver": name, "n_iter": MAX_STEPS, "rtol": RTOL} for name in scale.solvers}
    baseline = {"solver": "picard, 2 steps", "backward": "unrolled"}
    arms, left_out = [], []
    for solver, options in solves.items():
        for backward in BACKWARDS:
            labels = {"solver": solver, "backward": backward}
            try:
                IMLP(4, backward=backward, **options)
            except (TypeError, ValueError) as error:
                left_out.append((f"{solver}, {backward}", str(error)))
                continue
            arms.append(
                Arm(
                    labels=labels,
                    data=data,
                    settings=scale.imixer(data, **options, backward=backward) | changes,
                    baseline=None if labels == baseline else baseline,
                )
            )
    return Experiment(
        name="solvers",
        title="Solvers and backward modes",
        question="Which solver and which backward mode to train with? Seconds, calls of the map and bytes are those of "
        "one training step on one batch, forward and backward. The cosine is that of the gradient to the exact one, of "
        "the loss at the fixed point (implicit, float64, solved to 1e-8), on the same weights and images: before "
        "the training, halfway, and after it.",
        arms=tuple(arms),
        measurements=("step",),
        left_out=tuple(left_out),
        num_seeds=scale.solver_seeds,
    )


def depth(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """One to four hidden layers."""
    data = data_sets[0]
    baseline = {"hidden layers": "2"}
    arms = []
    for layers in (1, 2, 3, 4):
        labels = {"hidden layers": str(layers)}
        changes: dict[str, Any] = {} if layers == 2 else {"hidden_layers": layers, "hidden_solve": "joint"}
        arms.append(
            Arm(
                labels=labels,
                data=data,
                settings=scale.imixer(data, **changes),
                baseline=None if labels == baseline else baseline,
            )
        )
    return Experiment(
        name="depth",
        title="Depth of the token mixer's Hopfield network",
        question="Do more hidden layers help? One is Mixer's MLP, two the paper's model; the layers are solved for "
        "jointly, with two steps.",
        arms=tuple(arms),
    )


def inference_steps(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """Accuracy of trained models at other numbers of steps."""
    return Experiment(
        name="inference-steps",
        title="Steps at test time",
        question="Models trained with n_iter steps are tested with k steps, and at the fixed point (Anderson to 1e-5).",
        arms=steps_of_training(scale, data_sets[0]),
        measurements=("inference-steps",),
    )


def certified(scale: Scale, data_sets: Sequence[DataSet]) -> Experiment:
    """The paper's normalization against the certified one."""
    data = data_sets[0]
    arms = []
    solves: dict[str, dict[str, Any]] = {
        "2 steps": {"n_iter": 2},
        f"to {RTOL:g}": {"n_iter": MAX_STEPS, "rtol": RTOL, "backward": "implicit"},
    }
    for solver, options in solves.items():
        baseline = {"contraction": "paper", "solve": solver}
        for contraction in ("paper", "certified"):
            changes = {} if contraction == "paper" else {"contraction": contraction}
            arms.append(
                Arm(
                    labels={"contraction": contraction, "solve": solver},
                    data=data,
                    settings=scale.imixer(data, **options, **changes),
                    baseline=None if contraction == "paper" else baseline,
                )
            )
    return Experiment(
        name="certified",
        title="Certified contraction",
        question="What does a guarantee that the map contracts cost? The bound on the Lipschitz constant is certain, "
        "the rate is measured. Each is the largest over the layers of a model; the table has means and deviations of "
        "these over seeds. A bound below 1 is a certificate.",
        arms=tuple(arms),
        measurements=("certificate",),
    )
