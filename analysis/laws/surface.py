"""Loss surfaces by name. To add one that is a sum of powers, add one value here; else see analysis.laws.formulas."""

from __future__ import annotations

from analysis.laws.farseer import FarseerLaw
from analysis.laws.formulas import BROKEN, DATA_CONSTRAINED, EXPERTS, PRECISION
from analysis.laws.law import Law
from analysis.laws.power import SurfaceLaw, Term
from scaling.errors import unknown

_E, _N, _D = Term("E"), Term("A", (("n_params", "alpha"),)), Term("B", (("n_tokens", "beta"),))
_CHINCHILLA = SurfaceLaw(
    "chinchilla", "L = E + A/N^α + B/D^β", "Hoffmann et al. 2022, arXiv 2203.15556", (_E, _N, _D)
)
_TIED = Term("B", (("n_tokens", "alpha"),))
_GAMMA = SurfaceLaw(
    "gamma",
    "L = E + (A/N^α + B/D^β)^γ",
    "the Chinchilla form (Hoffmann et al. 2022) inside Kaplan et al. 2020's outer power, arXiv 2001.08361, eq. 1.5",
    (_E, _N, _D),
    outer="gamma",
    nested=("chinchilla", (("gamma", 1.0),)),
)

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _CHINCHILLA,
        SurfaceLaw(
            "tied",
            "L = E + A/N^α + B/D^α",
            "Gadre et al. 2024, arXiv 2403.08540: E + (a·M^η + b·M^−η)·C^−η with M = D/N, α = 2η",
            (_E, _N, _TIED),
            fixed=(("beta", "alpha"),),
        ),
        SurfaceLaw(
            "chinchilla_no_floor",
            "L = A/N^α + B/D^β",
            "the Chinchilla form with E = 0: far above the floor, loss is a sum of pure powers",
            (_N, _D),
            fixed=(("E", 0.0),),
        ),
        SurfaceLaw(
            "tied_no_floor",
            "L = A/N^α + B/D^α",
            "the tied form with E = 0: the frontier is a pure power of compute",
            (_N, _TIED),
            fixed=(("E", 0.0), ("beta", "alpha")),
        ),
        _GAMMA,
        SurfaceLaw(
            "kaplan",
            "L = (A/N^α + B/D)^γ, A = Nc^α, B = Dc, αN = α·γ, αD = γ",
            "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5: [(Nc/N)^(αN/αD) + Dc/D]^αD, N without embeddings",
            (_N, Term("B", (("n_tokens", 1.0),))),
            outer="gamma",
            fixed=(("E", 0.0), ("beta", 1.0)),
        ),
        SurfaceLaw(
            "frontier",
            "L = L∞ + a·C^−s on compute-optimal runs",
            "Kaplan et al. 2020, arXiv 2001.08361; with a floor, Hoffmann et al. 2022",
            (Term("L_inf"), Term("a", (("flops", "s"),))),
            on_frontier=True,
        ),
        SurfaceLaw(
            "frontier_no_floor",
            "L = a·C^−s on compute-optimal runs",
            "Kaplan et al. 2020, arXiv 2001.08361",
            (Term("a", (("flops", "s"),)),),
            on_frontier=True,
            fixed=(("L_inf", 0.0),),
        ),
        BROKEN,
        DATA_CONSTRAINED,
        SurfaceLaw(
            "width_depth",
            "L = E + A/N^α + B/D^β + A_w/w^α_w + A_d/d^α_d, w the width, d the depth",
            "McLeish et al. 2025 (Gemstones), arXiv 2502.06857; their γ, ζ are α, β here, their α, β are α_w, α_d",
            (_E, _N, _D, Term("A_w", (("width", "alpha_w"),)), Term("A_d", (("depth", "alpha_d"),))),
            nested=("chinchilla", (("A_w", 0.0), ("A_d", 0.0), ("alpha_w", 0.5), ("alpha_d", 0.5))),
        ),
        EXPERTS,
        SurfaceLaw(
            "fine_grained",
            "L = E + (g/G^γ + A)/N^α + B/D^β, G the granularity, N with all experts",
            "Krajewski et al. 2024, arXiv 2402.07871, eq. 9; N without embeddings, at one number of experts",
            (_E, _N, _D, Term("g", (("n_params", "alpha"), ("granularity", "gamma")))),
            nested=("chinchilla", (("g", 0.0), ("gamma", 0.5))),
        ),
        FarseerLaw(),
        PRECISION,
    )
}
"""Every surface by name."""


def get_law(name: str) -> Law:
    """The law of that name.

    Raises:
        InputError: no such law; lists all.
    """
    if name not in LAWS:
        raise unknown("law", name, LAWS)
    return LAWS[name]
