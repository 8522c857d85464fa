"""Tools that help to train implicit layers: warm starts, iterates, dropout masks, Jacobian regularization."""

from implicit.training.dropout import dropout_mask
from implicit.training.iterates import iterates
from implicit.training.jacobian_regularization import jacobian_regularization
from implicit.training.warm_start import WarmStart

__all__ = ["WarmStart", "dropout_mask", "iterates", "jacobian_regularization"]
