"""Time, memory and cost of a run before it begins."""
