"""Training of iMixers, and other image classifiers of timm, on one device or many.

    config = TrainingConfig(**PRESETS["digits"])
    result = train(config, load_data(config))

`imixer-train` is its command line, in `imixer.training.train_command`.
"""

from imixer.checkpoint_file import CheckpointError
from imixer.training.checkpoints import load_checkpoint
from imixer.training.command_line import Command, parse
from imixer.training.config import TrainingConfig
from imixer.training.evaluation import Evaluation, evaluate
from imixer.training.images import load_data
from imixer.training.interruption import TrainingInterruptedError
from imixer.training.learner import NonFiniteError
from imixer.training.loop import TrainingResult, train
from imixer.training.model import build_model
from imixer.training.presets import PRESETS
from imixer.training.run_folder import EpochMetrics

__all__ = [
    "CheckpointError",
    "Command",
    "EpochMetrics",
    "Evaluation",
    "NonFiniteError",
    "PRESETS",
    "TrainingConfig",
    "TrainingInterruptedError",
    "TrainingResult",
    "build_model",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "parse",
    "train",
]
