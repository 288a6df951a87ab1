"""A harvest: request, plan, workers, status, log."""
