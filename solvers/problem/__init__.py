"""What solvers and implicit layers are built from: layouts of states, the flat map, autocast, norms, options."""

from solvers.problem.autocast import AutocastMode, without_autocast
from solvers.problem.compile_option import check_compile
from solvers.problem.flat_map import FlatMap, InDims, check_not_written, mixing_advice, require_callable, version_of
from solvers.problem.foreign_names import names_options
from solvers.problem.hyperparameters import (
    Hyperparameters,
    as_float,
    as_int,
    checked_int,
    require_damping,
    require_positive,
    require_positive_int,
)
from solvers.problem.layout import Layout, check_structure, checked_batch_dims
from solvers.problem.names import resolve
from solvers.problem.norms import inner, relative, rms_norm
from solvers.problem.on_failure import OnFailure, check_on_failure
from solvers.problem.replaced_tensors import copy_with_tensors, with_tensors
from solvers.problem.slopes import direction_of, slope_inverse
from solvers.problem.small_systems import back_substitute, inverse_or_zero
from solvers.problem.state_type import S
from solvers.problem.traceable import Traceable, Traced
from solvers.problem.truth_values import all_of, as_number
from solvers.problem.window import add_combination, combine, dot, recorded, store

__all__ = [
    "AutocastMode",
    "FlatMap",
    "Hyperparameters",
    "InDims",
    "Layout",
    "OnFailure",
    "S",
    "Traceable",
    "Traced",
    "add_combination",
    "all_of",
    "as_float",
    "as_int",
    "as_number",
    "back_substitute",
    "check_compile",
    "check_not_written",
    "check_on_failure",
    "check_structure",
    "checked_batch_dims",
    "checked_int",
    "combine",
    "copy_with_tensors",
    "direction_of",
    "dot",
    "inner",
    "inverse_or_zero",
    "mixing_advice",
    "names_options",
    "recorded",
    "relative",
    "require_callable",
    "require_damping",
    "require_positive",
    "require_positive_int",
    "resolve",
    "rms_norm",
    "slope_inverse",
    "store",
    "version_of",
    "with_tensors",
    "without_autocast",
]
