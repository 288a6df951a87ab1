"""Environment variables that libraries read, set before any thread runs."""

from __future__ import annotations

import os

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would start one process per core early, without our environment, so we could not use them
    "RAY_prestart_worker_first_driver": "0",
}


def set_defaults() -> None:
    """Set each of our variables that the user has not set.

    Changing the environment while another thread reads it is not safe, so every command calls this
    first. In a Python program, the code that needs Ray calls it.
    """
    for name, value in RAY.items():
        if name not in os.environ:
            os.environ[name] = value
