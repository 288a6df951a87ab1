"""Training by several processes, with or without Ray."""
