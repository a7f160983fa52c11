"""Scaling laws as values, and published constants."""

from analysis.laws.formulas import POST_TRAINING_QUANTIZATION, effective, repetition_law
from analysis.laws.law import Floats, FormulaLaw, Law, Parameter
from analysis.laws.power import SurfaceLaw, Term, compute_optimal
from analysis.laws.published import PUBLISHED, PUBLISHED_FITS, PublishedAllocation, PublishedFit, PublishedLaw
from analysis.laws.surface import LAWS, get_law

__all__ = [
    "LAWS", "POST_TRAINING_QUANTIZATION", "PUBLISHED", "PUBLISHED_FITS", "Floats", "FormulaLaw", "Law", "Parameter",
    "PublishedAllocation", "PublishedFit", "PublishedLaw", "SurfaceLaw", "Term", "compute_optimal", "effective", "get_law",
    "repetition_law",
]  # fmt: skip
