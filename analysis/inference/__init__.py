"""Fits, intervals, backtests."""

from analysis.inference.fitting import FitResult, fit_law

__all__ = ["FitResult", "fit_law"]
