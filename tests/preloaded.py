"""Libraries that every process of the tests needs sooner or later, loaded once by their server.

pyarrow imports pandas when it is given its first list, and numba most of itself when it is given
its first function: together more than a second of each process.
"""

import pandas  # noqa: F401
from numba.core.registry import cpu_target

cpu_target.target_context.refresh()
cpu_target.typing_context.refresh()
