"""Ratios to the physical limit, both sides timed in one run. `python -m bench` prints the table."""
