"""Texts to audit."""

from __future__ import annotations

WORDS = "The wind went round the old mill and no one at the long table said a word before the lamp was lit again. "
TEXTS = [WORDS[at:] + WORDS[:at] for at in (31, 77, 9)]
