"""The figures of a report: data in, matplotlib Figure out; no pyplot, no global state.

One style for all: a 6-inch canvas with 12-point type (legible when a phone shows it 370 pixels wide), every axis
labelled with its unit, model size on viridis, and the colours of Okabe & Ito (2008), which differ for every kind of
colour vision, for everything else. A Theme says whether the page behind is light or dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from analysis.show.numbers import si
from scaling.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from analysis.inference import FitResult
    from analysis.runs import Runs
    from scaling.records import Forecast

Floats = NDArray[np.float64]

PARAMS_LABEL = {"total": "", "non_embedding": ", without embeddings", "body_head": ", body and head"}
BUDGET_TOLERANCE = 0.12
"""Runs whose log10 FLOPs lie this close to their neighbour's share an IsoFLOP budget."""


@dataclass(frozen=True)
class Theme:
    """Colours that depend on the page behind the figure."""

    background: str
    ink: str
    """Text, axes and the fitted lines."""
    faint: str
    """Grid lines."""
    band: str
    """Forecast intervals and the forecast itself."""
    actual: str
    """What came."""
    scale: tuple[float, float]
    """The part of viridis that stands out from the background."""

    @property
    def colours(self) -> Colormap:
        """Viridis, cut to `scale`."""
        return ListedColormap(colormaps["viridis"](np.linspace(*self.scale, 256)))


LIGHT = Theme(
    background="#ffffff", ink="#1c2430", faint="#e3e7ec", band="#0072b2", actual="#d55e00", scale=(0.0, 0.92)
)
DARK = Theme(background="#171c24", ink="#e4e8ee", faint="#2c3542", band="#56b4e9", actual="#ff8a3d", scale=(0.3, 1.0))


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, atomically; returns `path`."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=200))
    return path


def _canvas(theme: Theme, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with labelled, styled axes."""
    figure = Figure(figsize=(6.0, 4.6), facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot(facecolor=theme.background)
    ax.set_xlabel(x, fontsize=12, color=theme.ink)
    ax.set_ylabel(y, fontsize=12, color=theme.ink)
    ax.tick_params(which="both", labelsize=11, color=theme.ink, labelcolor=theme.ink)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.ink)
    ax.grid(color=theme.faint, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def _legend(ax: Axes, theme: Theme, **options: Any) -> None:
    ax.legend(
        fontsize=10,
        labelcolor=theme.ink,
        facecolor=theme.background,
        edgecolor=theme.faint,
        framealpha=0.85,
        **options,
    )


def _si_log_axis(ax: Axes, axis: str) -> None:
    """A logarithmic axis of counts: 100k, 1M, 10M."""
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    this = getattr(ax, f"{axis}axis")
    decades = np.log10(high / low)
    this.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)))
    this.set_major_formatter(FuncFormatter(lambda value, _: si(value, 1)))
    this.set_minor_formatter(NullFormatter())


def _flops_axis(ax: Axes) -> None:
    """A logarithmic x axis of FLOPs, labelled at powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _loss_log_axis(ax: Axes) -> None:
    """A logarithmic y axis of losses with round labels: power laws are straight, numbers are readable."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _size_scale(n_params: Floats, theme: Theme) -> ScalarMappable:
    low, high = float(n_params.min()), float(n_params.max())
    norm = LogNorm(low, high if high > low else 1.01 * low)
    return ScalarMappable(norm, theme.colours)


def _size_bar(figure: Figure, ax: Axes, sizes: ScalarMappable, params: str, theme: Theme) -> None:
    bar = figure.colorbar(sizes, ax=ax, pad=0.02, aspect=28)
    bar.set_label(f"N, parameters{PARAMS_LABEL.get(params, '')}", fontsize=11, color=theme.ink)
    low, high = sizes.get_clim()
    assert low is not None
    assert high is not None
    bar.set_ticks(list(np.geomspace(low, high, 4)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, 2)))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=10, color=theme.ink, labelcolor=theme.ink)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _column(table: pd.DataFrame, name: str) -> Floats:
    return table[name].to_numpy(dtype=float)


def flops_per_param_token(table: pd.DataFrame, n_params: Floats) -> Floats:
    """C/(N·D) at these sizes: c0 + c1/√N, least squares over the runs; exactly 6 where the data count 6ND.

    Attention's share of the FLOPs per token falls as 1/width, so as 1/√N at a fixed depth; c0 is what remains.
    """
    n, d, c = (_column(table, name) for name in ("n_params", "n_tokens", "flops"))
    ratio = c / (n * d)
    if np.ptp(np.log(n)) < 0.1:
        return np.full_like(n_params, ratio.mean())
    slope, constant = np.polyfit(n**-0.5, ratio, 1)
    return np.maximum(constant + slope * n_params**-0.5, ratio.min() / 2)


def frontier(fit: FitResult, table: pd.DataFrame, budgets_flops: Floats) -> tuple[Floats, Floats]:
    """Compute-optimal N and D on the fitted surface under the runs' own FLOP counting, by search over N.

    Args:
        budgets_flops: shape (B,).
    Returns:
        N* and D*, each of shape (B,).
    """
    n, d = _column(table, "n_params"), _column(table, "n_tokens")
    centre = np.sqrt(budgets_flops / 6)[:, None] * np.exp(np.mean(np.log(n / d)) / 2)
    sizes = centre * np.geomspace(1 / 300, 300, 1201)
    tokens = budgets_flops[:, None] / (sizes * flops_per_param_token(table, sizes))
    best = np.argmin(fit.predict(sizes, tokens), axis=1)[:, None]
    return np.take_along_axis(sizes, best, 1)[:, 0], np.take_along_axis(tokens, best, 1)[:, 0]


def loss_against_compute(
    fit: FitResult,
    runs: Runs,
    forecast: Forecast | None = None,
    actual: float | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """All runs coloured by size, the compute-optimal frontier, its 50/90% band beyond them, forecast and actual."""
    table = runs.table
    c, loss, n = (_column(table, name) for name in ("flops", "loss", "n_params"))
    target = forecast.spec.flops if forecast else 10 * float(c.max())
    figure, ax = _canvas(theme, "C, training compute (FLOPs)", "held-out loss (nats per token)")
    sizes = _size_scale(n, theme)
    ax.scatter(c, loss, c=sizes.to_rgba(n), s=34, edgecolors=theme.background, linewidths=0.6, zorder=3)  # type: ignore[arg-type]

    budgets = np.geomspace(c.min(), max(target, c.max()), 80)
    n_star, d_star = frontier(fit, table, budgets)
    ax.plot(budgets, fit.predict(n_star, d_star), color=theme.ink, linewidth=1.8, label="compute-optimal", zorder=4)
    ahead = np.geomspace(c.max(), max(target, 1.01 * c.max()), 12)
    n_ahead, d_ahead = frontier(fit, table, ahead)
    for level, alpha in ((0.9, 0.16), (0.5, 0.3)):
        low, high = fit.predict_interval(n_ahead, d_ahead, level)
        ax.fill_between(ahead, low, high, color=theme.band, alpha=alpha, linewidth=0, label=f"{level:.0%} interval")
    if forecast:
        _mark_forecast(ax, theme, target, forecast)
    if actual is not None:
        ax.plot(target, actual, "*", color=theme.actual, markersize=13, label="actual", zorder=6)
    _flops_axis(ax)
    _loss_log_axis(ax)
    _size_bar(figure, ax, sizes, runs.convention.get("params", ""), theme)
    _legend(ax, theme, loc="lower left")
    return figure


def _mark_forecast(ax: Axes, theme: Theme, x: float, forecast: Forecast) -> None:
    """The forecast loss with its 90% interval, at `x`."""
    low, high = forecast.interval_90
    errors = [[forecast.loss - low], [high - forecast.loss]]
    ax.errorbar(
        x,
        forecast.loss,
        errors,
        fmt="o",
        color=theme.band,
        markersize=9,
        markerfacecolor="none",
        capsize=6,
        linewidth=2,
        label="forecast",
        zorder=5,
    )


def isoflop_groups(table: pd.DataFrame, most: int = 7) -> list[tuple[float, pd.DataFrame]]:
    """Runs by compute budget: (geometric mean FLOPs, its runs), for budgets with at least three sizes, ascending."""
    ordered = table.sort_values("flops")
    gaps = np.diff(np.log10(_column(ordered, "flops")), prepend=np.nan)
    label = np.cumsum(gaps > BUDGET_TOLERANCE)
    groups = [group for _, group in ordered.groupby(label) if group["n_params"].nunique() >= 3]
    if len(groups) > most:
        groups = [groups[i] for i in np.linspace(0, len(groups) - 1, most).round().astype(int)]
    return [(float(np.exp(np.log(_column(g, "flops")).mean())), g) for g in groups]


def isoflop_curves(fit: FitResult, runs: Runs, theme: Theme = LIGHT) -> Figure:
    """Loss against N for each budget: runs (moved along the surface to the group's mean budget), surface, minima."""
    table = runs.table
    groups = isoflop_groups(table)
    n_all, c_all = _column(table, "n_params"), _column(table, "flops")
    budgets = np.array([b for b, _ in groups]) if groups else np.geomspace(c_all.min(), c_all.max(), 5)
    figure, ax = _canvas(
        theme,
        f"N, parameters{PARAMS_LABEL.get(runs.convention.get('params', ''), '')}",
        "held-out loss (nats per token)",
    )
    colours = theme.colours(np.linspace(0, 1, len(budgets)))
    span = np.geomspace(n_all.min() / 1.4, n_all.max() * 1.4, 160)
    n_star, d_star = frontier(fit, table, budgets)
    minima = fit.predict(n_star, d_star)
    ceiling = _column(table, "loss").max() * 1.06
    for i, budget in enumerate(budgets):
        curve = fit.predict(span, budget / (span * flops_per_param_token(table, span)))
        shown = curve <= ceiling
        ax.plot(span[shown], curve[shown], color=colours[i], linewidth=1.8, label=f"{budget:.1e}")
        if groups:
            group = groups[i][1]
            n, d, loss = (_column(group, name) for name in ("n_params", "n_tokens", "loss"))
            at_budget = loss * fit.predict(n, budget / (n * flops_per_param_token(table, n))) / fit.predict(n, d)
            ax.scatter(n, at_budget, color=colours[i], s=30, edgecolors=theme.background, linewidths=0.6, zorder=3)
    inside = (n_star >= span[0]) & (n_star <= span[-1])
    ax.plot(
        n_star[inside],
        minima[inside],
        "D--",
        color=theme.actual,
        markersize=6,
        linewidth=1.2,
        label="minimum",
        zorder=4,
    )
    _si_log_axis(ax, "x")
    _loss_log_axis(ax)
    _legend(ax, theme, title="C (FLOPs)", loc="center left", bbox_to_anchor=(1.0, 0.5))
    legend = ax.get_legend()
    assert legend is not None
    legend.get_title().set(color=theme.ink, fontsize=10)
    return figure


def surface(fit: FitResult, runs: Runs, forecast: Forecast | None = None, theme: Theme = LIGHT) -> Figure:
    """Contours of the fitted loss over N and D, the runs, the compute-optimal line and the forecast's place."""
    table = runs.table
    n, d, c = (_column(table, name) for name in ("n_params", "n_tokens", "flops"))
    corner_n, corner_d = (forecast.n_params, float(forecast.spec.tokens)) if forecast else (n.max(), d.max())
    n_axis = np.geomspace(n.min() / 1.5, max(n.max(), corner_n) * 1.8, 90)
    d_axis = np.geomspace(d.min() / 1.5, max(d.max(), corner_d) * 1.8, 90)
    grid_n, grid_d = np.meshgrid(n_axis, d_axis)
    loss = fit.predict(grid_n, grid_d)
    params = PARAMS_LABEL.get(runs.convention.get("params", ""), "")
    figure, ax = _canvas(theme, f"N, parameters{params}", "D, training tokens")
    ax.grid(visible=False)
    levels = np.geomspace(loss.min() * 1.01, loss.max() * 0.99, 9)
    ax.pcolormesh(
        grid_n, grid_d, loss, cmap="viridis_r", norm=LogNorm(), alpha=0.4, shading="gouraud", rasterized=True
    )
    lines = ax.contour(grid_n, grid_d, loss, levels=levels, colors=theme.ink, linewidths=0.8, alpha=0.8)
    budgets = np.geomspace(c.min() / 10, 10 * c.max() * (forecast.extrapolation_ratio if forecast else 1), 60)
    n_star, d_star = frontier(fit, table, budgets)
    ax.plot(n_star, d_star, color=theme.actual, linewidth=2.2, label="compute-optimal")
    ax.scatter(n, d, s=26, color=theme.ink, edgecolors=theme.background, linewidths=0.6, zorder=3, label="runs")
    if forecast:
        ax.plot(
            corner_n,
            corner_d,
            "*",
            color=theme.band,
            markeredgecolor=theme.ink,
            markersize=17,
            label="forecast",
            zorder=4,
        )
    ax.set_xlim(n_axis[0], n_axis[-1])
    ax.set_ylim(d_axis[0], d_axis[-1])
    _si_log_axis(ax, "x")
    _si_log_axis(ax, "y")
    # labels stand where the contours cross a path right of and below the compute-optimal line, clear of the edges
    path_n = np.exp(np.interp(np.linspace(0.3, 0.93, 200), (0, 1), np.log(n_axis[[0, -1]])))
    path_d = np.exp(np.interp(np.linspace(0.07, 0.75, 200), (0, 1), np.log(d_axis[[0, -1]])))
    path_loss = fit.predict(path_n, path_d)
    crossed = [level for level in levels if path_loss.min() < level < path_loss.max()]
    at = [int(np.abs(path_loss - level).argmin()) for level in crossed]
    ax.clabel(lines, crossed, fmt="%.2f", fontsize=9, colors=theme.ink, manual=[(path_n[i], path_d[i]) for i in at])
    figure.legend(
        loc="outside upper center",
        ncols=3,
        fontsize=10,
        labelcolor=theme.ink,
        facecolor=theme.background,
        frameon=False,
    )
    return figure


def forecast_curve(forecast: Forecast, metrics: Sequence[Mapping[str, Any]] = (), theme: Theme = LIGHT) -> Figure:
    """The flagship's held-out loss over its tokens inside the band that was forecast, and the interval at its end.

    Args:
        metrics: rows of the flagship's metrics.jsonl; those with "val_loss" are drawn. Empty before it ran.
    """
    figure, ax = _canvas(theme, "D, training tokens", "held-out loss (nats per token)")
    tokens = [p.tokens for p in forecast.curve]
    for name, alpha in (("interval_90", 0.16), ("interval_50", 0.3)):
        low, high = ([getattr(p, name)[side] for p in forecast.curve] for side in (0, 1))
        ax.fill_between(tokens, low, high, color=theme.band, alpha=alpha, linewidth=0, label=f"{name[-2:]}% interval")
    if tokens:
        ax.plot(tokens, [p.loss for p in forecast.curve], color=theme.band, linewidth=1.6)
    _mark_forecast(ax, theme, forecast.spec.tokens, forecast)
    # the first points of a run are far above everything else: what lies left of the band is not drawn
    start = min(tokens, default=0.05 * forecast.spec.tokens)
    seen = [(r["tokens"], r["val_loss"]) for r in metrics if r.get("val_loss") is not None and r["tokens"] >= start]
    if seen:
        ax.plot(
            *zip(*seen, strict=True), "o-", color=theme.actual, markersize=5, linewidth=1.6, label="actual", zorder=6
        )
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, 2)))
    _legend(ax, theme, loc="upper right")
    return figure


def residuals(
    fit: FitResult, runs: Runs, forecast: Forecast | None = None, actual: float | None = None, theme: Theme = LIGHT
) -> Figure:
    """100·(loss / fitted − 1) of every run against compute; the flagship's error against its forecast."""
    table = runs.table
    n, d, c, loss = (_column(table, name) for name in ("n_params", "n_tokens", "flops", "loss"))
    error = 100 * (loss / fit.predict(n, d) - 1)
    figure, ax = _canvas(theme, "C, training compute (FLOPs)", "loss over the fit (%)")
    ax.axhline(0, color=theme.ink, linewidth=1.2)
    sizes = _size_scale(n, theme)
    ax.scatter(c, error, c=sizes.to_rgba(n), s=34, edgecolors=theme.background, linewidths=0.6, zorder=3)  # type: ignore[arg-type]
    if forecast and actual is not None:
        missed = 100 * (actual / forecast.loss - 1)
        ax.plot(
            forecast.spec.flops, missed, "*", color=theme.actual, markersize=13, label="flagship, over its forecast"
        )
        _legend(ax, theme, loc="best")
    reach = 1.15 * max(float(np.abs(ax.dataLim.intervaly).max()), 0.1)
    ax.set_ylim(-reach, reach)
    _flops_axis(ax)
    _size_bar(figure, ax, sizes, runs.convention.get("params", ""), theme)
    return figure
