"""What the scripts of this folder share: the server they ask, the conversation they send, and how they say what they saw.

Each script is run as ``python openai_chat.py http://127.0.0.1:8000/v1`` beside a running ``winnow serve``; ``make clients``
starts one and runs them all. The key is read from ``WINNOW_API_KEY``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "embedded"
KEY = os.environ.get("WINNOW_API_KEY", "none")
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()[:1600]  # some 360 tokens, of which an eighth is kept
PROMPT = f"{TEXT}\n\nSummarize this in one sentence."
MESSAGES = [{"role": "user", "content": PROMPT}]
NEW_TOKENS = 32

_last = time.perf_counter()


def base_url() -> str:
    """The server's address, with ``/v1``: the first argument."""
    return sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"


def engine_answer() -> dict[str, Any] | None:
    """What the engine itself answers to :data:`MESSAGES` (own_answer.py), if a file with it is the second argument."""
    return json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else None


def check(what: str, holds: bool, *found: object) -> None:
    """Say whether something holds, with the seconds since the last check; end the script if it does not."""
    global _last
    now = time.perf_counter()
    print(f"{'ok' if holds else 'failed':6} {now - _last:6.1f} s  {what}", flush=True)
    _last = now
    if not holds:
        sys.exit("\n".join(repr(one) for one in found) or 1)


def raises(error: type[Exception], call: Any, *args: Any, **options: Any) -> Any:
    """The error of that class that a call raises; None if it raises none."""
    try:
        call(*args, **options)
    except error as raised:
        return raised
    return None
