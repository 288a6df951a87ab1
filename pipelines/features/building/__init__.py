"""A feature build: configuration, tasks, pool of workers."""
