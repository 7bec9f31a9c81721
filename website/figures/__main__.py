"""Draw all pictures, or those that are named, from docs/data, and print the names of the files.

python -m website.figures [agreement ...] [--out docs/pictures]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from website.figures import FILES
from website.records import ROOT, read_records
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError

PICTURES = ROOT / "docs" / "pictures"


def main(words: Sequence[str] | None = None) -> None:
    """Draw, and print the files. Raises InputError for a picture that is unknown, or one whose record is missing.

    A missing record ends only its own pictures: all others are drawn first.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args(words)
    if unknown := [name for name in args.names if name not in FILES]:
        raise InputError(f"picture {unknown[0]!r} is unknown: there are {', '.join(FILES)}")
    records, missing = read_records(), []
    for name in args.names or FILES:
        figure = import_module(f"website.figures.{name}")
        try:
            files = figure.make(records, args.out)
        except InputError as error:
            missing.append(f"{name}: {error}")
            continue
        for file in files:
            print(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
    if missing:
        raise InputError("; ".join(missing))


if __name__ == "__main__":
    with one_sentence("website.figures"):
        main()
