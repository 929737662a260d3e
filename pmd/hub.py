"""Lets the libraries of the Hugging Face Hub read their cache where the Hub does not answer.

Else each file costs half a minute of retries, also of a model that is in the cache.
"""

import logging
import os
from functools import cache
from pathlib import Path

TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


def prepare_hub(path: str) -> None:
    """Ask once in this process whether the Hub answers, unless `path` is a local one; if not, say so and go offline."""
    if not Path(path).expanduser().exists() and not _answers():
        _go_offline()


@cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return True  # as the user wants it
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception as error:  # of its HTTP client, which versions of huggingface_hub choose differently
        log.warning("%s does not answer (%s): only what is in its cache is used.", constants.ENDPOINT, error)
        return False
    return True


def _go_offline() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # it has been read from the environment when it was imported
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries and processes that begin later
