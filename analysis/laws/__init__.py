"""Scaling laws as values, and published constants."""

from analysis.laws.law import Floats, FormulaLaw, Law, Parameter
from analysis.laws.power import SurfaceLaw, Term, compute_optimal
from analysis.laws.published import PUBLISHED, PublishedLaw
from analysis.laws.surface import LAWS, get_law

__all__ = [
    "LAWS", "PUBLISHED", "Floats", "FormulaLaw", "Law", "Parameter", "PublishedLaw", "SurfaceLaw", "Term", "compute_optimal", "get_law",
]  # fmt: skip
