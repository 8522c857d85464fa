"""The examination of one solve for a root."""

import math
from typing import Any

import torch
from torch import Tensor

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.examination import Examination
from implicit.diagnostics.layer_report import largest
from implicit.diagnostics.measurements import FlatMapping, dense_jacobian
from implicit.diagnostics.replay import Setting
from solvers import Solution, Status
from solvers.problem import relative, rms_norm

# The most unknowns of a sample whose Jacobian is formed.
MOST_UNKNOWNS = 64
# How far away the Jacobian is compared with that at the root: at least and, by rounding, at most so much of the state;
# and so many times Newton's step or rounding.
NEARBY, NOT_NEARBY, AWAY = 1e-3, 0.1, 300
# A Jacobian is singular at a root if its smallest singular value is at most this part of that nearby.
SINGULAR = 0.05
# A minimum of |F|: no step of so much of the state reduces |F| by so much.
REACH, STATIONARY = 0.01, 1e-3
# A start is far from the root if it is so many times the size of either away, and a state has run away by this factor.
FAR, RUN_AWAY = 10, 3


class RootExamination(Examination):
    """Finds the causes for a solve of ``F(z) = 0``, by the Jacobian of F and by what other solvers and starts do."""

    called = "F"
    rounding = "rounding in F moves the root by {floor:.0e} of its size"

    def _map_at(self, point: Tensor) -> FlatMapping:
        """``z - A F(z)`` with the pseudoinverse A of the Jacobian, so that rounding in F counts as that of the root."""
        jacobian = self._jacobian(point)
        if jacobian is not None:
            usable = jacobian.isfinite().all(dim=(1, 2), keepdim=True)
            inverse = torch.linalg.pinv(torch.where(usable, jacobian, torch.eye(point.shape[1]).to(jacobian)))
        else:
            scale = self._solution.scaling
            slope = relative(rms_norm(self._replay.flat(self._replay.start)), rms_norm(self._replay.start))
            factor = relative(torch.ones_like(slope), slope) if scale is None else scale.flatten().to(slope)

        def newton(z: Tensor) -> Tensor:
            residual = self._replay.flat(z)
            if jacobian is None:
                return z - factor.unsqueeze(1) * residual
            step: Tensor = (inverse @ residual.unsqueeze(2)).squeeze(2)
            return z - step

        return newton

    def _jacobian(self, point: Tensor) -> Tensor | None:
        return dense_jacobian(self._replay.flat, point) if 0 < point.shape[1] <= MOST_UNKNOWNS else None

    def _measure(self, point: Tensor) -> None:
        super()._measure(point)
        self.spectrum.growth.fill_(math.nan)

    def _check_success(self) -> None:
        self._find_singular(self._point, self._status == Status.CONVERGED)

    def _explain_failures(self) -> None:
        replay, trials = self._replay, self._trials
        found, point = ~self._failed, self._point
        if bool(self._left.any()):
            trials.search(self._left)
            found, point = trials.equilibria()
            steps = f"Steps of {type(replay.options.solver).__name__}"
            astray = self._lost & ((self._status == Status.DIVERGED) | (self._status == Status.STAGNATED))
            astray |= self._status == Status.NONFINITE
            self._add(Cause.DOMAIN_LEFT, astray & found, f"{steps} lead to NaN or infinity; those of others do not.")
            self._find_singular(point, self._left & found)
            least = self._find_minima(found)
            self._find_why_not_found(point, found, steps)
            self._add(Cause.UNKNOWN, self._left, f"The smallest |F| is {largest(least[self._left]):.1e}.")
        elif any(finding.cause is Cause.NOT_FINITE for finding in self.findings):
            trials.search_starts()
        self._measure(point)

    def _find_singular(self, point: Tensor, rows: Tensor) -> None:
        """Compare the smallest singular value of the Jacobian at a root with those on either side of it."""
        jacobian = self._jacobian(point)
        if jacobian is None or not bool(rows.any()):
            return
        replay, least = self._replay, _least_singular(jacobian)
        nearby = torch.zeros_like(least)
        size = rms_norm(point)
        step = rms_norm(self._map_at(point)(point) - point)
        rounding = (AWAY * self.floor).clamp(NEARBY, NOT_NEARBY).to(size) * size
        distance = torch.maximum(rounding, AWAY * step)
        for _ in range(3):
            way = self._noise(point)
            way = way * relative(distance, rms_norm(way)).unsqueeze(1)
            sides = [self._jacobian(point + side * way) for side in (-1, 1)]
            pair = [_least_singular(side) for side in sides if side is not None]
            nearby = torch.maximum(nearby, torch.minimum(*pair).nan_to_num(0.0))
        multiple = ((nearby > 0) & (least <= SINGULAR * nearby)).cpu() & rows
        smaller = largest(relative(least, nearby).cpu()[multiple])
        self._add(
            Cause.SINGULAR_JACOBIAN,
            multiple,
            f"The smallest singular value of the Jacobian at the root is {smaller:.0e} times that at a distance of "
            f"{largest(relative(distance, size).cpu()[multiple]):.0e} times the size of the root: a multiple root.",
        )
        ratio = _reciprocal_condition(jacobian).cpu()
        dependent = (ratio <= 64 * point.shape[1] * torch.finfo(replay.layout.dtype).eps) & rows & ~multiple
        self._add(
            Cause.SINGULAR_JACOBIAN,
            dependent,
            f"The smallest singular value of the Jacobian, its rows and columns scaled alike, is "
            f"{largest(ratio[dependent]):.0e} of the largest: the equations depend on each other.",
        )

    def _noise(self, point: Tensor) -> Tensor:
        noise = torch.randn(point.shape, generator=self._generator, dtype=point.dtype)
        return noise.to(point.device)

    def _find_minima(self, found: Tensor) -> Tensor:
        """Find the samples whose solves end at a minimum of |F|, or run away; return the least |F|, (B,)."""
        replay, trials = self._replay, self._trials
        begin = rms_norm(replay.flat(replay.start))
        own = self._lowest([self._solution])
        rows = self._left & found & self._is_minimum(own)
        worst = largest(relative(rms_norm(replay.flat(own)), begin).cpu()[rows])
        self._add(
            Cause.LOCAL_MINIMUM,
            rows,
            f"|F| is {worst:.1e} times that at the start, and no step of {REACH:.0%} of the state reduces it.",
        )
        best = self._lowest([self._solution, *(t.solution for t in trials.made if t.setting.batch_dims is None)])
        rows = self._left & ~found & self._is_minimum(best)
        worst = largest(relative(rms_norm(replay.flat(best)), begin).cpu()[rows])
        tried = f"{len(trials.made)} other solvers and starts were tried."
        self._add(
            Cause.NO_ROOT,
            rows,
            f"{tried} |F| is at least {worst:.1e} times that at the start, and no step of {REACH:.0%} of the state "
            "reduces it there.",
        )
        sizes = [rms_norm(replay.flat(factor * best)) for factor in (1, 2, 4)]
        away = (sizes[2] < sizes[1]) & (sizes[1] < sizes[0]) & (rms_norm(best) >= RUN_AWAY * rms_norm(replay.start))
        rows = self._left & ~found & away.cpu()
        self._add(
            Cause.NO_ROOT,
            rows,
            f"{tried} |F| falls to {largest(sizes[0].cpu()[rows]):.1e} while the state grows to "
            f"{largest(rms_norm(best).cpu()[rows]):.1e}, and is smaller still at 2 and 4 times that state.",
        )
        return sizes[0].cpu()

    def _lowest(self, solutions: list[Solution[Any]]) -> Tensor:
        """(B, D) of the values of solves and where they ended, those with the smallest |F|."""
        replay, best = self._replay, self._point
        least = rms_norm(replay.flat(best))
        for solution in solutions:
            for z in (replay.layout.pack(solution.value), getattr(solution.state, "z", None)):
                if z is not None and z.shape == best.shape:
                    new = rms_norm(replay.flat(z))
                    best = torch.where((new < least).unsqueeze(1), z, best)
                    least = torch.fmin(least, new)
        return best

    def _is_minimum(self, point: Tensor) -> Tensor:
        """(B,) whether no Levenberg-Marquardt step of a hundredth of the state reduces |F|, on the CPU."""
        jacobian = self._jacobian(point)
        if jacobian is None:
            return torch.zeros(len(point), dtype=torch.bool)
        flat, start = self._replay.flat, self._replay.start
        residual = flat(point)
        fine = jacobian.isfinite().all(dim=(1, 2)) & residual.isfinite().all(dim=1)
        u, s, vh = torch.linalg.svd(torch.where(fine[:, None, None], jacobian, 0.0))
        target = (u.mT @ residual.unsqueeze(2)).squeeze(2)  # (B, D)
        reach = REACH * torch.maximum(rms_norm(point), rms_norm(point - start))
        lowest = rms_norm(residual)
        for exponent in range(-12, 3):
            weights = s / (s.square() + (10.0**exponent * s[:, :1]).square()).clamp_min(torch.finfo(s.dtype).tiny)
            step = -(vh.mT @ (weights * target).unsqueeze(2)).squeeze(2)
            step = step * relative(reach, rms_norm(step)).clamp_max(1.0).unsqueeze(1)
            lowest = torch.fmin(lowest, rms_norm(flat(point + step)))
        size, begin = rms_norm(residual), rms_norm(flat(start))
        nonzero = ~(size <= torch.finfo(size.dtype).eps ** 0.75 * begin)
        minimum: Tensor = fine & nonzero & (lowest > (1 - STATIONARY) * size)
        return minimum.cpu()

    def _find_why_not_found(self, point: Tensor, found: Tensor, steps: str) -> None:
        """Tell the causes apart where there is a regular root: by more steps, and by a start near the root."""
        replay, trials = self._replay, self._trials
        rows = self._left & found
        if not bool(rows.any()):
            return
        limit = replay.tested.max_steps
        longer = trials.make(Setting(max_steps=10 * limit))
        longer = longer or next((t for t in trials.made if t.setting == Setting(max_steps=10 * limit)), None)
        reaches = torch.zeros_like(rows) if longer is None else longer.converged
        near = point + REACH * point.abs() * self._noise(point)
        close = trials.make(Setting(start=("near", replay.layout.unpack(near))), keep=False)
        arrives = torch.zeros_like(rows) if close is None else close.converged
        sizes = [rms_norm(z) for z in (point, replay.start)]
        smaller = torch.where(sizes[1] > 0, torch.minimum(*sizes), sizes[0])
        distance = relative(rms_norm(point - replay.start), smaller).cpu()
        far = rows & arrives & reaches & (distance >= FAR)
        self._add(
            Cause.START_TOO_FAR,
            far,
            f"The start and the root are {largest(distance[far]):.1e} times the size of one of them apart; from a "
            f"start within {REACH:.0%} of the root, {limit} steps are enough.",
        )
        few = self._left & reaches
        count = 0 if longer is None else int(longer.solution.num_steps.flatten().cpu()[few].max()) if few.any() else 0
        self._add(Cause.TOO_FEW_STEPS, few, f"The solve takes {count} steps, and max_steps is {limit}.")
        self._add(Cause.UNSUITED_SOLVER, rows, f"{steps} end elsewhere, even if there are ten times as many.")


def _least_singular(matrix: Tensor) -> Tensor:
    """(B, D, D) -> (B,), NaN where the matrix is not finite."""
    fine = matrix.isfinite().all(dim=(1, 2))
    values: Tensor = torch.linalg.svdvals(torch.where(fine[:, None, None], matrix, 0.0))[:, -1]
    return torch.where(fine, values, math.nan)


def _reciprocal_condition(matrix: Tensor) -> Tensor:
    """(B, D, D) -> (B,) the smallest singular value by the largest, with rows and columns scaled to be of one size."""
    for _ in range(5):
        for dim in (1, 2):
            norm = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True).sqrt()
            matrix = matrix / torch.where(norm > 0, norm, 1.0)
    fine = matrix.isfinite().all(dim=(1, 2))
    values = torch.linalg.svdvals(torch.where(fine[:, None, None], matrix, torch.eye(matrix.shape[1]).to(matrix)))
    return relative(values[:, -1], values[:, 0])
