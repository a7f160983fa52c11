"""Plots, the HTML report, and how numbers are written in them."""
