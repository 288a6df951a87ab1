"""Environment variables that libraries read, set before any thread runs."""

from __future__ import annotations

import os

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train reads the others when it is imported; torch on a cold network drive takes a minute
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def set_defaults() -> None:
    """Give each variable of ours its value, where the user has given none.

    The environment belongs to the whole process, and changing it while another thread reads it is
    not safe: every command calls this first. Called from Python, whoever needs Ray calls it.
    """
    for name, value in RAY.items():
        if name not in os.environ:
            os.environ[name] = value
