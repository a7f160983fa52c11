"""The science: laws, fits, intervals, forecasts, plots. Never imports torch."""
