"""The way to the end: what training loss, gradient norm and the loss's scatter should do along a run, with a covariance.

A run is cut into equal windows. In window k, at fraction f of its D tokens, the mean training loss of a run of the sweep is
compared with the fitted surface as if the run had ended there, h_k = ln L_k − ln S(N, f·D): the surface carries most of the
fall, so that h is nearly one curve for all runs and only its rest needs a forecast. The mean over runs counts a run C / largest C
times. A plane in ln N and ln D would add a trend at the target. Of the held-out curve any share of it from none to all is
as likely: half is added, and the standard deviation of a uniform share, 1/√12, is uncertainty. Of the channels, whose
misses of the surface have trends too, it is not believed: half of it is a standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.inference import FitResult
from analysis.laws.law import Floats
from analysis.runs import Runs
from scaling.accounting import ParamsConvention, count_params
from scaling.records import Channel
from scaling.spec import RunSpec
from scaling.sweepdir import SweepDir

WINDOWS = 50
LEAST_RUNS = 4
_LEAST_STEPS = 4
"""Of a window."""
_DENSE = 0.9
"""Share of its steps that a run's metrics hold at least."""
_NEAR = 0.02
"""Of a run, between evaluations that were asked for at one fraction of it and came at the ends of steps."""
_SMOOTH = 5
_LEAST_SD = 1e-3


@dataclass(frozen=True)
class Trace:
    """A run by windows; NaN where a window has no steps yet."""

    train_loss: Floats
    """ln of the window's mean training loss."""
    grad_norm: Floats
    """Mean of ln gradient norm."""
    scatter: Floats
    """ln of the standard deviation between steps that a batch of one token would have: √(mean squared difference / 2) · √batch."""
    fractions: Floats
    """Of the run, at the evaluations."""
    val_loss: Floats
    """ln held-out loss there."""


def trace(spec: RunSpec, rows: Sequence[dict[str, float]], windows: int) -> Trace:
    """Cut a run's metrics into windows."""
    out = {name: np.full(windows, np.nan) for name in ("train_loss", "grad_norm", "scatter")}
    steps = np.array([r["step"] for r in rows if "train_loss" in r], int)
    loss = np.array([r["train_loss"] for r in rows if "train_loss" in r], float)
    norm = np.array([r.get("grad_norm", np.nan) for r in rows if "train_loss" in r], float)
    index = np.minimum((steps - 1) * windows // spec.steps, windows - 1)
    for k in np.unique(index):
        inside = index == k
        if inside.sum() < max(2, spec.steps // windows - 1):
            continue  # still being filled
        out["train_loss"][k] = np.log(loss[inside].mean())
        out["grad_norm"][k] = np.log(np.maximum(norm[inside], 1e-12)).mean()
        squares = np.diff(loss[inside]) ** 2
        out["scatter"][k] = 0.5 * np.log(max(float(squares.mean()) / 2, 1e-18) * spec.batch_tokens)
    evaluated = [(r["tokens"], r["val_loss"]) for r in rows if r.get("val_loss")]
    tokens, val = np.array(evaluated, float).reshape(-1, 2).T
    return Trace(**out, fractions=tokens / spec.tokens, val_loss=np.log(val))


def _filled(t: Trace) -> Trace:
    """With the windows that a resumed run lost interpolated."""
    out = {}
    for name in ("train_loss", "grad_norm", "scatter"):
        values, k = getattr(t, name), np.arange(len(t.train_loss))
        there = np.isfinite(values)
        out[name] = np.interp(k, k[there], values[there]) if there.any() else values
    return replace(t, **out)


def middles(windows: int) -> Floats:
    """Fraction of the run at the middle of each window."""
    return (np.arange(windows) + 0.5) / windows


class Paths:
    """The sweep's runs by windows, and what they say of another run.

    Args:
        worth: what N and D of that run are worth as parameters and fresh tokens, where it repeats its text.
    """

    def __init__(
        self, fit: FitResult, runs: Runs, worth: Callable[[Floats, Floats], tuple[Floats, Floats]] | None = None
    ) -> None:
        self.fit, self.worth = fit, worth
        sweep = SweepDir(Path(runs.source))
        found: list[tuple[RunSpec, list[dict[str, float]]]] = []
        for run_id in runs.table["run_id"]:
            run = sweep.run(str(run_id))
            rows = run.metrics() if run.spec_json.exists() else []
            if sum(bool(r.get("val_loss")) for r in rows) >= 2:
                found.append((run.spec(), rows))
        self.specs = [spec for spec, _ in found]
        dense = [spec.steps for spec, rows in found if sum("grad_norm" in r for r in rows) > _DENSE * spec.steps]
        most = min(dense, default=0) // _LEAST_STEPS if len(dense) == len(found) else 0
        self.windows = min(WINDOWS, most) if most >= 10 else 0
        self.traces = [_filled(trace(spec, rows, max(self.windows, 1))) for spec, rows in found]
        self.log_flops = np.log([spec.flops for spec in self.specs])

    def __len__(self) -> int:
        return len(self.specs)

    def _at(self, spec: RunSpec, fractions: Floats, is_target: bool = False) -> tuple[Floats, Floats]:
        """N and f·D, of the target what they are worth."""
        convention: ParamsConvention = self.fit.convention["params"]  # type: ignore[assignment]
        n, d = np.array(count_params(spec.shape).count(convention), float), fractions * spec.tokens
        return self.worth(n, d) if self.worth and is_target else (n, d)

    def _surface(self, spec: RunSpec, fractions: Floats, is_target: bool = False) -> Floats:
        """ln S(N, f·D)."""
        return np.log(self.fit.predict(*self._at(spec, fractions, is_target)))

    def _forecast(self, y: Floats, spec: RunSpec) -> tuple[Floats, Floats, Floats]:
        """Weighted mean (m,), what the trend adds (m,) and residuals about the trend in ln N and ln D (R, m) of rows y (R, m)."""
        weight = np.exp(self.log_flops - self.log_flops.max())
        mean = weight @ y / weight.sum()
        x = np.array([_place(s) for s in self.specs])
        centre = x.mean(0)
        slope, *_ = np.linalg.lstsq(x - centre, y - y.mean(0), rcond=1e-6)
        residual = y - y.mean(0) - (x - centre) @ slope
        return mean, y.mean(0) + (_place(spec) - centre) @ slope - mean, residual

    def curve(self, spec: RunSpec, fractions: Floats) -> tuple[Floats, Floats, Floats]:
        """ln(held-out loss / final held-out loss) of a run at fractions of it; standard deviation of ln held-out loss; its degrees of freedom.

        ln L(f) = ln S(N, f·D) + y(f), where y(1) is a run's own noise: the variance is that of the surface at N and f·D, in whose
        reach the law-form error is counted, and that of y between runs. Between their evaluations the runs' training loss gives
        the shape, shifted to meet them. Degrees of freedom are of the sum of the two (Satterthwaite 1946), at the end the forecast's.
        """
        missed = [
            t.val_loss - self._surface(own, t.fractions) for own, t in zip(self.specs, self.traces, strict=True)
        ]
        rows = []
        for own, t, y in zip(self.specs, self.traces, missed, strict=True):
            if not self.windows:
                rows.append(np.interp(fractions, t.fractions, y))
                continue
            at = middles(self.windows)
            shape = t.train_loss - self._surface(own, at)
            shift = np.interp(fractions, t.fractions, y - np.interp(t.fractions, at, shape))
            rows.append(np.interp(fractions, at, shape) + shift)
        paths, ends = np.array(rows), np.array([y[-1] for y in missed])
        mean, trend, _ = self._forecast(paths - ends[:, None], spec)
        fallen = self._surface(spec, fractions, True) - self._surface(spec, np.ones(1), True)
        trend = np.where(fractions < 1, trend, 0.0)
        surface = self.fit.predictive_sd(*self._at(spec, fractions, True)) ** 2 - self.fit.run_noise**2
        between_runs = self._between_runs(paths, missed, spec, fractions)
        variance = surface + between_runs + trend**2 / 12
        freedom = variance**2 / (surface**2 / self.fit.freedom + between_runs**2 / _freedom(paths))
        return fallen + mean + trend / 2, np.sqrt(variance), np.where(fractions < 1, freedom, self.fit.freedom)

    def _between_runs(self, paths: Floats, missed: Sequence[Floats], spec: RunSpec, fractions: Floats) -> Floats:
        """(m,) variance of y(f) between runs, at the end that of their noise.

        From the first fraction on at which all runs were evaluated it is interpolated between such fractions: what
        `paths` (R, m) holds in between has the noise of its windows too, which an evaluation has not.
        """

        def variance(y: Floats) -> Floats:
            residual = self._forecast(y, spec)[2]
            return np.asarray((residual**2).sum(0) / _freedom(residual))

        nearest = [[int(np.abs(t.fractions - f).argmin()) for t in self.traces] for f in self.traces[0].fractions]
        shared = [
            (f, [y[k] for y, k in zip(missed, index, strict=True)])
            for f, index in zip(self.traces[0].fractions, nearest, strict=True)
            if all(abs(t.fractions[k] - f) <= _NEAR for t, k in zip(self.traces, index, strict=True))
        ]
        at = np.array([f for f, _ in shared])
        there = variance(np.array([y for _, y in shared]).T)
        there[-1] = self.fit.run_noise**2
        return np.where(fractions < at[0], variance(paths), np.interp(fractions, at, there))

    def channels(self, spec: RunSpec, final_sd: float) -> list[Channel]:
        """Expected training loss, gradient norm and scatter of a run; none where the runs' metrics are too thin.

        Args:
            final_sd: standard deviation of ln final loss: the level of the whole path is not known better.
        """
        if not self.windows or len(self) < LEAST_RUNS or spec.steps < _LEAST_STEPS * self.windows:
            return []
        at = middles(self.windows)
        out = []
        for name in ("train_loss", "grad_norm", "scatter"):
            y = np.array([getattr(t, name) for t in self.traces])
            if name == "train_loss":
                y = y - np.array([self._surface(s, at) for s in self.specs])
            mean, trend, residual = self._forecast(y, spec)
            if name == "train_loss":
                mean = mean + self._surface(spec, at, True)
            out.append(_channel(name, mean, trend / 2, residual, final_sd if name == "train_loss" else None))
        return out


def _channel(name: str, mean: Floats, drift: Floats, residual: Floats, level_sd: float | None) -> Channel:
    """Moments of the residuals (R, m): a standard deviation by window, and a part that lasts beside one that does not.

    Args:
        level_sd: of a shift of the whole path; None: that of the runs' own shifts and of half the trend.
    """
    freedom = _freedom(residual)
    raw = np.sqrt((residual**2).sum(0) / freedom)
    padded = np.pad(raw, _SMOOTH // 2, mode="edge")
    sd = np.maximum(np.convolve(padded, np.full(_SMOOTH, 1 / _SMOOTH), mode="valid"), _LEAST_SD)
    z = residual / sd
    m = z.shape[1]
    lags = np.array([(z[:, : m - lag] * z[:, lag:]).sum() / freedom / (m - lag) for lag in range(m // 2)])
    lasting = float(np.clip(1.5 * lags[1] - 0.5 * lags[3], 0.02, 0.98))
    below = np.flatnonzero(lags[1:] < lasting / np.e)
    if level_sd is None:
        level_sd = float(np.hypot(np.sqrt((residual.mean(1) ** 2).sum() / freedom), np.median(np.abs(drift))))
    channel = Channel(
        name=name,  # type: ignore[arg-type]
        mean=[float(v) for v in mean],
        sd=[float(v) for v in sd],
        drift=[0.0] * m,
        level_sd=0.0,
        memory=float(below[0] + 1) if len(below) else float(m),
        white=1 - lasting,
    )
    white = np.linalg.solve(np.linalg.cholesky(covariance(channel)[:-1, :-1]), residual.T)
    scale = float(np.sqrt((white**2).sum() / freedom / m))  # the likeliest, given the correlations
    return replace(channel, sd=[scale * v for v in channel.sd], drift=[float(v) for v in drift], level_sd=level_sd)


def _freedom(residual: Floats) -> int:
    """Of residuals about a plane."""
    return max(len(residual) - 3, 1)


def _place(spec: RunSpec) -> Floats:
    """ln N and ln D of a run."""
    return np.log([count_params(spec.shape).body_head, spec.tokens])


def covariance(channel: Channel) -> Floats:
    """(m + 1, m + 1) of the windows' deviations from the mean, and of the run's end, which has no noise of a window.

    σ_i·σ_j·((1 − w)·e^(−|i − j|/τ) + w·δ_ij) + t_i·t_j·e^(−|ln f_i − ln f_j|) + level²: what the trend adds keeps its shape for
    a factor e of training only; it is 0 at the end, where the mean is the forecast's.
    """
    m = len(channel.sd)
    place = np.append(np.arange(m) + 0.5, m)
    sd = np.append(channel.sd, channel.sd[-1])
    drift = np.append(channel.drift, 0.0)
    lasting = np.exp(-np.abs(place[:, None] - place) / channel.memory) * (1 - channel.white)
    lasting += channel.white * np.diag(np.append(np.ones(m), 0.0))
    apart = np.abs(np.log(place[:, None] / place))
    out: Floats = np.outer(sd, sd) * lasting + np.outer(drift, drift) * np.exp(-apart) + channel.level_sd**2
    return out
