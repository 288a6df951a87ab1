"""Environment variables that libraries read, set before any thread runs."""

from __future__ import annotations

import os

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would start a process per core ahead of any work, without our environment: none fits it
    "RAY_prestart_worker_first_driver": "0",
}


def set_defaults() -> None:
    """Give each variable of ours its value, where the user has given none.

    The environment belongs to the whole process, and changing it while another thread reads it is
    not safe: every command calls this first. Called from Python, whoever needs Ray calls it.
    """
    for name, value in RAY.items():
        if name not in os.environ:
            os.environ[name] = value
