"""Merge several runs of ``winnow eval``: lines are checked, equal measurements kept once, differences reported."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from winnowkv.errors import InputError
from winnowkv.evaluate.report.lines import line_fault
from winnowkv.evaluate.report.store import parse_lines, read_config
from winnowkv.evaluate.report.summary import Line, section_of, setting_of
from winnowkv.files import decode, parse_json, read_bytes, read_text

SECTION_FIELDS = (
    "command",
    "protocol",
    "model",
    "dtype",
)  # differences in these make sections of their own, and are not reported again


def merge(folders: Sequence[Path]) -> tuple[list[Line], dict[str, Any]]:
    """Lines of several result folders, each labelled with its model and dtype, and one config for all.

    A measurement that several folders hold is taken from the last. The config holds what all runs have in common,
    ``runs`` (each folder's own settings) and ``differs`` (field -> folder -> value).

    Raises
    ------
    InputError
        For a folder without results of ``winnow eval``; for a broken line, with file and line; if rows of
        different data have the same name.
    """
    runs = {str(folder): _config(folder) for folder in folders}
    merged: dict[Hashable, Line] = {}
    expected: dict[Hashable, tuple[str, Any]] = {}
    for folder, config in runs.items():
        for line in read_lines(Path(folder)):
            labelled = {"model": config.get("model"), "dtype": config.get("dtype"), **line}
            row = (line["task"], line["row"])
            if "answers" in line:  # missing in a row that failed early
                origin, answers = expected.setdefault(row, (folder, line["answers"]))
                if answers != line["answers"]:
                    raise InputError(
                        f"{origin} and {folder} hold different rows under one name ({row[0]}, row {row[1]}): "
                        f"they were read from different data, so report them separately"
                    )
            merged[(*section_of(labelled), *row, *setting_of(line))] = labelled
    names = dict.fromkeys(name for config in runs.values() for name in config)
    values = {name: {folder: config.get(name) for folder, config in runs.items()} for name in names}
    common = {name: found for name, (found, *others) in ((n, tuple(v.values())) for n, v in values.items())
              if all(other == found for other in others)}  # fmt: skip
    differs = {name: values[name] for name in names if name not in common and name not in SECTION_FIELDS}
    return list(merged.values()), {**common, "runs": runs, "differs": differs}


def read_lines(folder: Path) -> list[Line]:
    """The checked lines of a result folder; an incomplete last line, of a run that was killed, is left out."""
    file = folder / "results.jsonl"
    raw = read_bytes(file, lambda why: InputError(f"{file} {why}: give folders that winnow eval wrote"))
    text = decode(raw[: raw.rfind(b"\n") + 1], lambda why: InputError(f"{file}, {why}"))
    lines = parse_lines(file, text)
    if not lines:
        raise InputError(f"{file} holds no finished line: run winnow eval again with the same --out")
    for number, line in enumerate(lines, 1):
        if fault := line_fault(line):
            raise InputError(f"{file}, line {number}: {fault}")
    return lines


def _config(folder: Path) -> dict[str, Any]:
    """A run's settings, with the machine that its summary names."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give folders that winnow eval wrote")
    config = read_config(folder)
    if config.get("command") != "eval":
        other = f" but of winnow {config['command']}" if isinstance(config.get("command"), str) else ""
        raise InputError(f"{folder} holds no results of winnow eval{other}: give folders that winnow eval wrote")
    try:
        summary = parse_json(read_text(folder / "summary.json", InputError), InputError)
    except InputError:
        return config  # a run that was killed has no summary yet
    machine = summary.get("machine") if isinstance(summary, dict) else None
    return {**config, "machine": machine if isinstance(machine, dict) else None}
