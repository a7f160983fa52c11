"""What to do with a fit: allocate a budget, forecast a run."""

from analysis.decide.allocate import Allocation, allocate, best_width, family_flops_per_token
from analysis.decide.forecast import make_forecast, write_forecast

__all__ = ["Allocation", "allocate", "best_width", "family_flops_per_token", "make_forecast", "write_forecast"]
