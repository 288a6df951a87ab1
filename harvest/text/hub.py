"""The present commit of a model on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # from the Hub's own HTTP client, which changes between releases
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_harvest.common.errors import InputError

TIMEOUT_SECONDS = 10.0


def hub_commit(name: str, revision: str | None = None) -> tuple[str, bool]:
    """Return the commit of a Hub model's branch, tag or commit, and whether the Hub is reachable.

    The commit is 40 hexadecimal digits. The Hub is asked once, without retries. If it can't be
    reached, the commit of a downloaded copy is returned. Raises InputError if there is no copy.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and _cached(name, revision):
        return revision, True
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither a local directory nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise InputError(
            f"The hub model {name} is gated: accept its terms on its page and run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"The hub model {name} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"There is no local directory {name} and no public hub model of that name; check the "
            "spelling, or run `hf auth login` if it is private."
        ) from error
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        commit = _cached(name, revision)
        if commit is None:
            raise InputError(
                f"There is no local directory {name}, and the model hub can't be reached to look "
                f"for it ({type(error).__name__}); check the connection, or give a local directory."
            ) from error
        return commit, False
    if info.sha is None:
        raise InputError(f"The hub doesn't say which commit {name} is at; give a local directory.")
    return info.sha, True


def _cached(name: str, revision: str | None) -> str | None:
    """Return the commit of the copy in the Hub's own cache, if there is one."""
    try:
        config = hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(config).parent.name
