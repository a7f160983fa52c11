"""The planner: what a run is, what it costs, how a grid of runs is made and launched. Never imports torch."""
