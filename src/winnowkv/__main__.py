"""``python -m winnowkv``: the command ``winnow``."""

from __future__ import annotations

from winnowkv.cli import main

if __name__ == "__main__":
    main()
