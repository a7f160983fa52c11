"""Learning-rate and batch laws from a sweep of learning rate × batch × size: optima by parabola, then a power law.

    peak_lr = c · N^a · D^b,   batch_tokens = c · D^b      (the form of Step Law, arXiv 2503.04715)

At one (N, D) and one batch, loss near its minimum is a parabola in ln(peak_lr); over batches, those minima are one in
ln(batch). The optimal learning rate rises with the batch, so the optima of all batches are fitted together,

    ln peak_lr = ln c' + a·ln N + b'·ln D + s·ln batch,

and the batch law is put in: b = b' + s·(exponent of the batch law). Where the sweep holds D/N fixed, a and b' are not
separable: then b' = 0, and a carries both.

Where cells hold a dense grid, the parabolas are not used: loss is flat and skewed about its minimum, and least squares
through every setting within NEAR of its cell's best (how Step Law was fitted) loses less on sizes left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.laws.law import Floats
from analysis.runs import Runs
from scaling.errors import InputError

WINDOW = 0.03
"""Runs within this relative loss of their cell's best enter its parabola (at least four do): further out it is none."""
BATCH_GAP = 0.01
"""A batch whose best loss is this much (relative) above the best batch's adds a standard deviation of 1 to its ln peak_lr."""
BATCH_PRIOR = (0.571, 0.1)
"""Exponent of D in the batch law and its standard deviation: Step Law, arXiv 2503.04715."""
NEAR = 0.0025
"""Settings within this relative loss of their cell's best are near-optimal: Step Law's threshold."""
_DENSE = 5
"""Near-optimal settings a cell, on average, from which on they say more than parabolas."""
_LEAST_POINTS = 4
_SEPARABLE = 0.2
_NOISE_FLOOR = 1e-3
"""Least standard deviation of ln loss between runs: three points leave no residual to measure it by."""


@dataclass(frozen=True)
class Parabola:
    """loss = loss_min·(1 + ½·curvature·(u − u_min)²) in u = ln(hyperparameter)."""

    minimum: float
    """u at the minimum, held inside the measured range."""
    loss: float
    curvature: float
    """Relative: of ln loss. 0 where the points show no minimum."""
    sd: float
    """Standard deviation of `minimum`."""
    inside: bool
    """Whether the minimum lies inside the measured range, so that it was measured and not extrapolated."""

    def regret(self, u: float) -> float:
        """Relative loss above the minimum when the hyperparameter is e^u."""
        return 0.5 * self.curvature * (u - self.minimum) ** 2


@dataclass(frozen=True)
class Cell:
    """The optimum at one (N, D)."""

    n_params: float
    n_tokens: float
    n_runs: int
    lr: Parabola
    """Of ln peak_lr, at the best batch."""
    batch: Parabola
    """Of ln batch_tokens; its sd is infinite where the batch was not varied."""
    by_batch: tuple[tuple[float, Parabola], ...] = ()
    """ln batch_tokens, and the optimum of ln peak_lr at that batch."""
    near: tuple[tuple[float, float], ...] = ()
    """ln peak_lr and ln batch_tokens of the near-optimal settings, best first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: optimum, interval and what being off by 2× costs."""
        low, high = np.exp(self.lr.minimum + np.array([-1.96, 1.96]) * self.lr.sd)
        return {
            "n_params": self.n_params,
            "n_tokens": self.n_tokens,
            "n_runs": self.n_runs,
            "peak_lr": float(np.exp(self.lr.minimum)),
            "peak_lr_interval_95": [float(low), float(high)],
            "peak_lr_inside": self.lr.inside,
            "batch_tokens": float(np.exp(self.batch.minimum)),
            "batch_inside": self.batch.inside,
            "loss": self.lr.loss,
            "penalty_lr_2x": self.lr.regret(self.lr.minimum + float(np.log(2))),
        }


@dataclass(frozen=True)
class HyperLaw:
    """coefficient · N^n_exponent · D^d_exponent with 95% half-widths of the exponents (None: fixed at 0)."""

    coefficient: float
    n_exponent: float
    d_exponent: float
    n_half_width: float | None
    d_half_width: float | None

    def __call__(self, n: float, d: float) -> float:
        return float(self.coefficient * n**self.n_exponent * d**self.d_exponent)


def fit_parabola(u: Floats, loss: Floats) -> Parabola:
    """The minimum of loss over u = ln(hyperparameter); duplicates of u (seeds) are averaged by the fit.

    With fewer than three different u there is no parabola: the best point, of infinite uncertainty.
    """
    best = int(np.argmin(loss))
    distinct = len(np.unique(u.round(9)))
    if distinct < 3:
        return Parabola(float(u[best]), float(loss[best]), 0.0, float("inf"), False)
    keep = loss <= loss[best] * (1 + WINDOW)
    if len(np.unique(u[keep].round(9))) < _LEAST_POINTS:
        nearest = np.unique(u.round(9))[np.argsort(np.abs(np.unique(u.round(9)) - u[best]))[:_LEAST_POINTS]]
        keep = np.isin(u.round(9), nearest)
    x, y = u[keep], np.log(loss[keep])
    centre = float(x.mean())
    design = np.vander(x - centre, 3)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    a, b, c = (float(v) for v in coefficients)
    if a <= 0:
        return Parabola(float(u[best]), float(loss[best]), 0.0, float("inf"), False)
    at = -b / (2 * a)
    residual = y - design @ coefficients
    noise = max(float(residual @ residual) / max(len(x) - 3, 1), _NOISE_FLOOR**2)
    covariance = noise * np.linalg.inv(design.T @ design)
    slope = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    sd = float(np.sqrt(slope @ covariance @ slope))
    low, high = float(u.min()), float(u.max())
    held = min(max(at + centre, low), high)
    ln_loss = c - b * b / (4 * a) + a * (held - centre - at) ** 2
    return Parabola(held, float(np.exp(ln_loss)), 2 * a, sd, low < at + centre < high)


def cells(runs: Runs) -> list[Cell]:
    """The optimum of every (N, D) with at least three learning rates at some batch, by N and then D.

    Raises:
        InputError: the table has no peak_lr, or no cell has three learning rates.
    """
    table = runs.table
    if "peak_lr" not in table:
        raise InputError(f"{runs.source}: no column peak_lr: a recipe needs runs at several learning rates")
    if "batch_tokens" not in table:
        table = table.assign(batch_tokens=1.0)
    found = []
    for (n, d), cell in _groups(table):
        per_batch = []
        for batch, group in cell.groupby("batch_tokens"):
            lr, loss = group["peak_lr"].to_numpy(float), group["loss"].to_numpy(float)
            if len(np.unique(lr)) >= 3:
                per_batch.append((float(np.log(batch)), fit_parabola(np.log(lr), loss), len(group)))
        if per_batch:
            found.append(_cell(n, d, per_batch, _near_optimal(cell)))
    if not found:
        raise InputError(f"{runs.source}: no size has runs at three or more learning rates (e.g. +grid=lr)")
    return found


def _groups(table: Any) -> list[tuple[tuple[float, float], Any]]:
    """Cells of one N and of D equal within 5%: whole batches round D differently at each batch."""
    out = []
    for n, size in table.groupby("n_params"):
        d = size["n_tokens"].to_numpy(float)
        level = np.concatenate([[0], np.cumsum(np.diff(np.sort(np.log(d))) > 0.05)])[
            np.argsort(np.argsort(d, kind="stable"))
        ]
        out += [((float(n), float(np.median(d[level == k]))), size[level == k]) for k in range(level.max() + 1)]
    return out


def _near_optimal(cell: Any) -> tuple[tuple[float, float], ...]:
    """Settings within NEAR of the cell's best; seeds of one setting are averaged."""
    loss = cell.groupby(["peak_lr", "batch_tokens"])["loss"].mean().sort_values()
    near = loss[loss <= loss.iloc[0] * (1 + NEAR)]
    return tuple((float(np.log(lr)), float(np.log(batch))) for lr, batch in near.index)


def _cell(
    n: float, d: float, per_batch: Sequence[tuple[float, Parabola, int]], near: tuple[tuple[float, float], ...]
) -> Cell:
    ln_batch = np.array([b for b, _, _ in per_batch])
    count = sum(c for _, _, c in per_batch)
    batch = fit_parabola(ln_batch, np.array([p.loss for _, p, _ in per_batch]))
    measured = sorted(per_batch, key=lambda item: item[0])
    at = float(np.interp(batch.minimum, [b for b, _, _ in measured], [p.minimum for _, p, _ in measured]))
    nearest = min(per_batch, key=lambda item: abs(item[0] - batch.minimum))[1]
    lr = Parabola(at, batch.loss, nearest.curvature, nearest.sd, nearest.inside)
    return Cell(n, d, count, lr, batch, tuple((b, p) for b, p, _ in measured), near)


def is_dense(found: Sequence[Cell]) -> bool:
    """Whether the near-optimal settings are many enough for `fit_near_optimal`."""
    return float(np.mean([len(c.near) for c in found])) >= _DENSE


def fit_laws(found: Sequence[Cell], separable: bool) -> tuple[HyperLaw, HyperLaw]:
    """The learning-rate and the batch law: through near-optimal settings of a dense grid, else through parabolas."""
    if is_dense(found):
        return fit_near_optimal(found, separable)
    batch = fit_batch(found)
    return fit_lr(found, separable, batch), batch


def fit_near_optimal(found: Sequence[Cell], separable: bool) -> tuple[HyperLaw, HyperLaw]:
    """Both laws by least squares through all near-optimal settings (Step Law, arXiv 2503.04715, and its released code).

    ln peak_lr = ln c + a·ln N + b·ln D and ln batch = ln c + b·ln D, each setting counting alike. Settings of one cell are
    not independent: the half-widths are of the cluster-robust covariance (X'X)⁻¹·(Σ_cell X'r·r'X)·(X'X)⁻¹.
    """
    cell = np.concatenate([np.full(len(c.near), i) for i, c in enumerate(found)])
    ln_n, ln_d = (np.log([getattr(c, f) for c in found])[cell] for f in ("n_params", "n_tokens"))
    ln_lr, ln_batch = np.array([setting for c in found for setting in c.near]).T
    one = np.ones(len(cell))
    lr, lr_half = _clustered(np.column_stack([one, ln_n, ln_d] if separable else [one, ln_n]), ln_lr, cell)
    batch, batch_half = _clustered(np.column_stack([one, ln_d]), ln_batch, cell)
    return (
        HyperLaw(
            float(np.exp(lr[0])), float(lr[1]), float(lr[2]) if separable else 0.0,
            float(lr_half[1]), float(lr_half[2]) if separable else None,
        ),
        HyperLaw(float(np.exp(batch[0])), 0.0, float(batch[1]), None, float(batch_half[1])),
    )  # fmt: skip


def _clustered(x: Floats, y: Floats, cell: np.ndarray) -> tuple[Floats, Floats]:
    """Least squares and 95% half-widths with rows of one cell correlated."""
    inverse = np.linalg.pinv(x.T @ x)
    theta: Floats = inverse @ (x.T @ y)
    cells_count = int(cell.max()) + 1
    scores = np.zeros((cells_count, x.shape[1]))
    np.add.at(scores, cell, x * (y - x @ theta)[:, None])
    small = cells_count / max(cells_count - x.shape[1], 1)
    half: Floats = 1.96 * np.sqrt(small * np.diag(inverse @ (scores.T @ scores) @ inverse))
    return theta, half


def fit_batch(found: Sequence[Cell]) -> HyperLaw:
    """batch_tokens = c · D^b by least squares through the cells' best batches, b drawn towards Step Law's .571 ± .1.

    A best batch is known to a factor of two at best: a few cells over a decade of D say little about b, and a forecast
    extrapolates it.
    """
    x = np.column_stack([np.ones(len(found)), np.log([c.n_tokens for c in found])])
    value, sd = BATCH_PRIOR
    prior = Parabola(value, 0.0, 0.0, sd, True)
    theta, half = _least_squares(np.vstack([x, [0.0, 1.0]]), [*(c.batch for c in found), prior])
    return HyperLaw(float(np.exp(theta[0])), 0.0, float(theta[1]), None, float(half[1]))


def fit_lr(found: Sequence[Cell], separable: bool, batch: HyperLaw) -> HyperLaw:
    """peak_lr = c · N^a · D^b where batch_tokens follows `batch`, by least squares through the optima of all batches.

    Args:
        separable: whether D has an exponent of its own beside N's.
        batch: the batch law that the learning rate is for.
    """
    rows = [(c, ln_batch, _blurred(parabola, c)) for c in found for ln_batch, parabola in c.by_batch]
    ln_n, ln_d = np.log([c.n_params for c, _, _ in rows]), np.log([c.n_tokens for c, _, _ in rows])
    ln_b = np.array([b for _, b, _ in rows])
    columns = {"one": np.ones(len(rows)), "n": ln_n}
    if separable:
        columns["d"] = ln_d
    if any(len(c.by_batch) > 1 for c in found):
        columns["batch"] = ln_b - np.log(batch.coefficient) - batch.d_exponent * ln_d  # 0 on the batch law
    theta, half = _least_squares(np.column_stack(list(columns.values())), [p for _, _, p in rows])
    value, width = dict(zip(columns, theta, strict=True)), dict(zip(columns, half, strict=True))
    return HyperLaw(
        float(np.exp(value["one"])),
        float(value["n"]),
        float(value.get("d", 0.0)),
        float(width["n"]),
        float(width["d"]) if separable else None,
    )


def _blurred(parabola: Parabola, cell: Cell) -> Parabola:
    """The optimum at one batch, the less certain the worse that batch is: the batch law will not go there."""
    gap = parabola.loss / min(p.loss for _, p in cell.by_batch) - 1
    return replace(parabola, sd=float(np.hypot(parabola.sd, gap / BATCH_GAP)))


def _least_squares(x: Floats, optima: Sequence[Parabola]) -> tuple[Floats, Floats]:
    """Coefficients and their 95% half-widths for the optima's positions on the columns of x, weighted by their sd.

    An optimum at the edge of what was tried, or none, counts with a standard deviation of a factor 2.
    """
    y = np.array([p.minimum for p in optima])
    sd = np.array([p.sd if p.inside and np.isfinite(p.sd) else np.log(2) for p in optima])
    weight = 1 / np.maximum(sd, 0.05)
    weighted = x * weight[:, None]
    theta, *_ = np.linalg.lstsq(weighted, y * weight, rcond=None)
    residual = (y - x @ theta) * weight
    # never less than the optima's own sd
    scatter = max(1.0, float(residual @ residual) / max(len(y) - x.shape[1], 1))
    half: Floats = 1.96 * np.sqrt(scatter * np.diag(np.linalg.pinv(weighted.T @ weighted)))
    return theta, half


def is_separable(found: Sequence[Cell]) -> bool:
    """Whether ln D varies enough apart from ln N, over at least four cells, to tell their exponents apart."""
    n, d = (np.log([getattr(c, f) for c in found]) for f in ("n_params", "n_tokens"))
    if len(found) < 4 or len(np.unique(n.round(6))) < 2:
        return False
    slope, intercept = np.polyfit(n, d, 1)
    return bool(np.std(d - slope * n - intercept) > _SEPARABLE)


def one_size_out(found: Sequence[Cell], separable: bool, batch: HyperLaw) -> list[dict[str, Any]]:
    """For each size with two others: the LR law fitted without it, asked about it; regret by the size's own parabola."""
    sizes = sorted({c.n_params for c in found})
    out = []
    for size in sizes if len(sizes) >= 3 else []:
        rest = [c for c in found if c.n_params != size]
        apart = separable and is_separable(rest)
        law = fit_near_optimal(rest, apart)[0] if is_dense(found) else fit_lr(rest, apart, batch)
        out += check(law, [c for c in found if c.n_params == size])
    return out


def check(law: HyperLaw, found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Predicted against measured optimum, and the loss given up by using the prediction, relative."""
    return [
        {
            "n_params": c.n_params,
            "n_tokens": c.n_tokens,
            "predicted_peak_lr": law(c.n_params, c.n_tokens),
            "measured_peak_lr": float(np.exp(c.lr.minimum)),
            "measured_inside": c.lr.inside,
            "regret": c.lr.regret(float(np.log(law(c.n_params, c.n_tokens)))),
        }
        for c in found
    ]
