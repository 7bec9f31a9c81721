"""The command ``winnow``: one small file a command."""

from winnowkv.cli.main import main

__all__ = ["main"]
