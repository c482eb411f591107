"""Whether the model and dataset hub can be reached, found out in seconds: its own client retries for half a minute."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

HUB_TIMEOUT_S = 5.0


def hub_answers() -> bool:
    """Whether the hub gives any answer within seconds; False also where offline mode is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's client brings certificates of its own
    except OSError:
        return False


def only_local_files(source: str | Path) -> bool:
    """Whether a model is to be read from disk or the hub's cache alone: it is a folder, or the hub does not answer."""
    return Path(source).exists() or not hub_answers()
