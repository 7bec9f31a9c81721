"""Which releases of vLLM the connector was tested with. Its interface is called experimental there and may change."""

from __future__ import annotations

import logging

from packaging.version import InvalidVersion, Version

from winnowkv.errors import UnsupportedEngineError

OLDEST, BEYOND = "0.32", "0.33"  # tested with the CPU build 0.32.0


def check_release(found: str, *, any_release: bool = False) -> None:
    """Raise UnsupportedEngineError for a release outside of what was tested; with ``any_release`` warn of it."""
    try:
        tested = Version(OLDEST) <= Version(found) < Version(f"{BEYOND}.dev0")  # nor what comes before that release
    except InvalidVersion:  # a build from source
        tested = False
    if tested:
        return
    text = f"vLLM {found} was not tested with winnowkv's connector (tested: from {OLDEST}, below {BEYOND})"
    if not any_release:
        raise UnsupportedEngineError(f'{text}: install such a release, or set "any_release": true in kv_connector_extra_config')
    logging.getLogger(__name__).warning(text)
