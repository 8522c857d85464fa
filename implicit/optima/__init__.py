"""Conditions that optima satisfy, and the projections and proximal operators that they are made of."""

from implicit.optima.conditions import projected_gradient, proximal_gradient, stationary
from implicit.optima.projections import (
    project_affine,
    project_ball,
    project_box,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_simplex,
)
from implicit.optima.proximal import prox_elastic_net, prox_group_lasso, prox_l1, prox_squared_l2

__all__ = [
    "project_affine",
    "project_ball",
    "project_box",
    "project_halfspace",
    "project_hyperplane",
    "project_l1_ball",
    "project_simplex",
    "projected_gradient",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_squared_l2",
    "proximal_gradient",
    "stationary",
]
