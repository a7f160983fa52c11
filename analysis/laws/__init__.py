"""Scaling laws as values, and published constants."""

from analysis.laws.published import PUBLISHED, PublishedLaw
from analysis.laws.surface import LAWS, SurfaceLaw, Term, compute_optimal, get_law

__all__ = ["LAWS", "PUBLISHED", "PublishedLaw", "SurfaceLaw", "Term", "compute_optimal", "get_law"]
