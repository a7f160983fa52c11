"""Laws that are no sum of powers of the runs' own columns: repeated data, experts, a broken frontier, precision.

Each is a function of (B, p) parameter vectors and n rows that returns predictions (B, n) and gradients (B, p, n), and a
FormulaLaw that names it. N: parameters, D: training tokens, C: training FLOPs, L: loss in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from analysis.laws.law import Columns, Floats, FormulaLaw, Law, Parameter
from analysis.laws.power import EXPONENT_RANGE

_E, _A, _B = (Parameter(name, linear=True) for name in ("E", "A", "B"))
_ALPHA, _BETA = (Parameter(name, *EXPONENT_RANGE) for name in ("alpha", "beta"))
NO_DECAY = 1e6
"""R* at which a repeated token is worth a fresh one."""
_MOST_REPEATED = 60.0
"""Largest ln(N/U_N) that is told from more: the value of N has long been constant."""


def _rows(values: Floats) -> list[Floats]:
    """The parameters of (B, p) vectors, each as (B, 1) to broadcast over rows."""
    return list(values.T[:, :, None])


def _stack(value: Floats, gradients: list[Floats]) -> tuple[Floats, Floats]:
    return value, np.stack([np.broadcast_to(g, value.shape) for g in gradients], axis=1)


def effective(total: ArrayLike, unique: ArrayLike, r: ArrayLike) -> Floats:
    """U·(1 + R*·(1 − e^(−R/R*))), R = total/U − 1: how many fresh ones `total` are worth of which only U differ.

    Muennighoff et al. 2023, arXiv 2305.16264, eq. 5. R* = r is how many repetitions it takes until the value of one more
    has fallen to 1/e; without limit a repeated token would be worth U·(1 + R*).

    Args:
        total: tokens (or parameters) in all, any shape.
        unique: U, of which they are repetitions, ≤ total.
        r: R*.
    """
    return _repeat(np.asarray(total, float), np.asarray(unique, float), np.asarray(r, float))[0]


def _repeat(total: Floats, unique: Floats, r: Floats) -> tuple[Floats, Floats, Floats]:
    """`effective` and its derivatives with respect to r and to U."""
    repetitions = total / unique - 1
    decay, lost = np.exp(-repetitions / r), -np.expm1(-repetitions / r)
    return (
        unique * (1 + r * lost),
        unique * (lost - repetitions / r * decay),
        1 + r * lost - decay * (1 + repetitions),
    )


def _data_constrained(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    e, a, b, alpha, beta, r_d, r_n = _rows(values)
    n, d, u = columns["n_params"], columns["n_tokens"], columns["unique_tokens"]
    both = (a > 0) & (b > 0)  # without one of the terms no N is optimal for U tokens: N counts in full
    odds = np.where(both, alpha * np.where(both, a, 1) / (beta * np.where(both, b, 1)), np.inf)
    log_optimal = (np.log(odds) + beta * np.log(u)) / alpha
    log_u_n = np.clip(log_optimal, np.log(n) - _MOST_REPEATED, np.log(n))
    u_n = np.exp(log_u_n)
    d_value, d_by_r, _ = _repeat(d, u, r_d)
    n_value, n_by_r, n_by_u = _repeat(np.broadcast_to(n, u_n.shape), u_n, r_n)
    n_power, d_power = n_value**-alpha, d_value**-beta
    n_slope, d_slope = -alpha * a * n_power / n_value, -beta * b * d_power / d_value
    through_u = np.where(log_u_n == log_optimal, n_slope * n_by_u * u_n / alpha, 0.0)  # ∂L/∂ln U_N, over α
    return _stack(
        e + a * n_power + b * d_power,
        [
            np.ones_like(n_power),
            n_power + through_u / np.where(both, a, 1),
            d_power - through_u / np.where(both, b, 1),
            -a * n_power * np.log(n_value) + through_u * (1 / alpha - log_u_n),
            -b * d_power * np.log(d_value) + through_u * (np.log(u) - 1 / beta),
            d_slope * d_by_r,
            n_slope * n_by_r,
        ],
    )


DATA_CONSTRAINED = FormulaLaw(
    "data_constrained",
    "L = E + A/N'^α + B/D'^β, D' = U·(1 + R_D·(1 − e^(−(D/U − 1)/R_D))), N' the same of U_N = min(N, N*(U)) with R_N",
    "Muennighoff et al. 2023, arXiv 2305.16264, eqs. 5–7; N*(U) = (αA/(βB))^(1/α)·U^(β/α) is the compute-optimal N for U tokens",
    (
        _E, _A, _B, _ALPHA, _BETA,
        Parameter("R_D", 0.05, NO_DECAY, start=(1.0, 100.0)), Parameter("R_N", 0.05, NO_DECAY, start=(1.0, 100.0)),
    ),
    ("n_params", "n_tokens", "unique_tokens"),
    _data_constrained,
    nested=("chinchilla", (("R_D", NO_DECAY), ("R_N", NO_DECAY))),
)  # fmt: skip
"""Runs that repeat their data. R_D needs runs of several epochs, R_N runs larger than the optimum of their U tokens."""


def repetition_law(base: Mapping[str, float]) -> Law:
    """The data-constrained law with only R_D and R_N free, on a fit of fresh data: what 10–20 repeated runs can tell.

    Args:
        base: E, A, B, alpha, beta.
    """
    return DATA_CONSTRAINED.restrict("repetition", **{k: base[k] for k in ("E", "A", "B", "alpha", "beta")})


def _experts(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    a, b, c, d, start, most = _rows(values)
    log_n, count = np.log10(columns["active_params"]), columns["experts"]
    gap = 1 / start - 1 / most
    share = 1 / (gap * (count - 1) + 1)  # 1/(E − 1 + 1/gap) = gap·share
    inverse = gap * share + 1 / most
    log_e = -np.log10(inverse)
    y = 10 ** (a * log_n + b * log_e + c * log_n * log_e + d)
    by_exponent = np.log(10) * y
    by_inverse = -(b + c * log_n) * y / inverse
    by_gap = share**2
    return _stack(
        y,
        [
            by_exponent * log_n,
            by_exponent * log_e,
            by_exponent * log_n * log_e,
            by_exponent,
            -by_inverse * by_gap / start**2,
            by_inverse * (by_gap - 1) / most**2,
        ],
    )


EXPERTS = FormulaLaw(
    "experts",
    "log10 L = a·log10 N + b·log10 Ê + c·log10 N·log10 Ê + d, 1/Ê = 1/(E − 1 + 1/(1/E_start − 1/E_max)) + 1/E_max",
    "Clark et al. 2022, arXiv 2202.01169, eqs. 1–2: N the parameters that a token meets, E experts, all on one D",
    (
        Parameter("a", -1.0, 1.0, start=(-0.2, 0.0)), Parameter("b", -1.0, 1.0, start=(-0.3, 0.0)),
        Parameter("c", -1.0, 1.0, start=(0.0, 0.03)), Parameter("d", -5.0, 5.0, start=(0.5, 1.5)),
        Parameter("E_start", 1.0, 32.0, start=(1.0, 8.0)), Parameter("E_max", 32.0, 1e6, start=(64.0, 4096.0)),
    ),
    ("active_params", "experts"),
    _experts,
)  # fmt: skip
"""Mixtures of experts. Ê saturates: E_start at E = 1, at most E_max; E_start = 1 and E_max → ∞ give Ê = E."""


def _broken(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    floor, a, s, c1, log10_d1, f1 = _rows(values)
    log_x = np.log(columns["flops"])
    u = (log_x - np.log(10) * log10_d1) / f1
    soft = np.logaddexp(0.0, u)
    passed = np.exp(u - soft)
    power = np.exp(-s * log_x - c1 * f1 * soft)
    y = a * power
    return _stack(
        floor + y,
        [
            np.ones_like(power),
            power,
            -y * log_x,
            -y * f1 * soft,
            y * c1 * passed * np.log(10),
            -y * c1 * (soft - u * passed),
        ],
    )


BROKEN = FormulaLaw(
    "broken",
    "L = L∞ + a·C^−s·(1 + (C/d1)^(1/f1))^(−c1·f1) on compute-optimal runs, d1 = 10^log10_d1",
    "Caballero et al. 2022, arXiv 2210.14891, eq. 1 with one break: at C = d1 the slope goes from s to s + c1, over a factor e^f1",
    (
        Parameter("L_inf", linear=True), Parameter("a", linear=True), Parameter("s", *EXPONENT_RANGE, start=(0.03, 0.4)),
        Parameter("c1", -3.0, 3.0, start=(-0.2, 0.2)), Parameter("log10_d1", 3.0, 35.0, start=(14.0, 26.0)),
        Parameter("f1", 0.02, 10.0, start=(0.1, 2.0)),
    ),
    ("flops",),
    _broken,
    nested=("frontier", (("c1", 0.0), ("log10_d1", 20.0), ("f1", 1.0))),
    on_frontier=True,
)  # fmt: skip
"""A frontier whose slope changes once."""


def _precision(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    e, a, b, alpha, beta, gamma = _rows(values)
    bits = columns["weight_bits"]
    kept = -np.expm1(-bits / gamma)
    log_n, log_d = np.log(columns["n_params"] * kept), np.log(columns["n_tokens"])
    n_power, d_power = np.exp(-alpha * log_n), np.exp(-beta * log_d)
    return _stack(
        e + a * n_power + b * d_power,
        [
            np.ones_like(n_power),
            n_power,
            d_power,
            -a * n_power * log_n,
            -b * d_power * log_d,
            alpha * a * n_power / kept * bits / gamma**2 * np.exp(-bits / gamma),
        ],
    )


PRECISION = FormulaLaw(
    "precision",
    "L = E + A/N_eff^α + B/D^β, N_eff = N·(1 − e^(−P/γ_w)), P the bits of a weight in training",
    "Kumar et al. 2024, arXiv 2411.04330, eq. 3, weights alone",
    (_E, _A, _B, _ALPHA, _BETA, Parameter("gamma_w", 0.1, 100.0, start=(0.5, 8.0))),
    ("n_params", "n_tokens", "weight_bits"),
    _precision,
    nested=("chinchilla", (("gamma_w", 0.1),)),
)
"""Training with weights of few bits."""


def _quantized(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    c, gamma_d, gamma_n, gamma = _rows(values)
    log_n, log_d, bits = np.log(columns["n_params"]), np.log(columns["n_tokens"]), columns["post_bits"]
    shape = np.exp(gamma_d * log_d - gamma_n * log_n - bits / gamma)
    y = c * shape
    return _stack(y, [shape, y * log_d, -y * log_n, y * bits / gamma**2])


POST_TRAINING_QUANTIZATION = FormulaLaw(
    "post_training_quantization",
    "δ = C_T·D^γ_D/N^γ_N·e^(−P/γ_post), P the bits of a weight after training (column post_bits)",
    "Kumar et al. 2024, arXiv 2411.04330, eq. 2: the rise in loss, to add to that of the model before",
    (
        Parameter("C_T", linear=True), Parameter("gamma_D", 0.0, 3.0), Parameter("gamma_N", 0.0, 3.0),
        Parameter("gamma_post", 0.05, 10.0, start=(0.2, 2.0)),
    ),
    ("n_params", "n_tokens", "post_bits"),
    _quantized,
)  # fmt: skip
"""What rounding the weights of a trained model costs. It predicts a difference of losses, so it is no surface by name."""
