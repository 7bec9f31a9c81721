"""Code blocks of the documentation: where they stand, in which language, and what they say to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from support.paths import ROOT

LEFT_OUT = {"docs/log.md"}  # a diary: its commands are those of their day
COMMANDS = (
    "winnow",
    "winnowkv",
    "python",
    "python3",
    "curl",
    "make",
    "pip",
    "uv",
)  # a block without a language that holds one is code
SHELLS = {"sh", "bash", "console"}
PLAIN = {"text", "mermaid"}  # what a command printed, and pictures
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*)[^`]*$")
NOT_RUN = re.compile(r"^<!-- not run(?: \((?P<lines>[^()]+)\))?: (?P<reason>\S.*?) -->$")
CONTINUES = re.compile(r"^<!-- continues: (?P<page>\S+\.md) -->$")
ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    ``line``: of its fence, from 1. ``heading``: the nearest above. ``before``: the line above it that is not blank.
    """

    page: str
    line: int
    language: str
    heading: str
    before: str
    text: str

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def not_run(self) -> str:
        """Why it is not run, or some of its lines are not; empty if all of it is."""
        found = NOT_RUN.match(self.before)
        return found["reason"] if found else ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Beginnings of the command lines that are not run, the others are; empty: none is, if there is a reason."""
        found = NOT_RUN.match(self.before)
        return tuple(part.strip() for part in found["lines"].split(",")) if found and found["lines"] else ()

    @property
    def continues(self) -> str:
        """The page, beside this one, whose first lines of Python come before it; empty if none."""
        found = CONTINUES.match(self.before)
        return found["page"] if found else ""

    @property
    def is_shell(self) -> bool:
        """Whether it holds command lines."""
        return self.language in SHELLS or (not self.language and any(map(is_command, self.text.splitlines())))

    @property
    def is_plain(self) -> bool:
        """Whether nothing in it is code."""
        return self.language in PLAIN or not (self.language or self.is_shell)


def pages() -> list[str]:
    """The pages whose blocks are checked, by their paths in the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/README.md")]
    return sorted({str(page.relative_to(ROOT)) for page in found} - LEFT_OUT)


def read_blocks(page: str) -> list[Block]:
    """The blocks of a page of the repository, in order."""
    return blocks_of((ROOT / page).read_text(encoding="utf-8"), page)


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a text. Raises ValueError for a fence that is not closed."""
    found, lines = [], text.splitlines()
    heading, before, at = "", "", 0
    while at < len(lines):
        line, opening = lines[at], FENCE.match(lines[at])
        at += 1
        if opening is None:
            heading = line.lstrip("#").strip() if re.match(r"^#+ ", line) else heading
            before = line.strip() or before
            continue
        start, indent = at, len(opening["indent"])
        while at < len(lines) and lines[at].strip() != opening["fence"]:
            at += 1
        if at == len(lines):
            raise ValueError(f"{page}:{start}: the block is not closed")
        body = "\n".join(one[min(indent, len(one) - len(one.lstrip())) :] for one in lines[start:at])
        found.append(Block(page, start, opening["language"], heading, before, body))
        before, at = "", at + 1
    return found


def is_command(line: str) -> bool:
    """Whether a line of a block without a language is a command line."""
    words = line.strip().removeprefix("$ ").split()
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
        if words and words[0].isidentifier():
            return True
    return bool(words) and words[0] in COMMANDS


@dataclass(frozen=True)
class CommandLine:
    """A command of a block: its words, ``variables`` set for it alone, the file that its output goes to, and its line."""

    words: tuple[str, ...]
    variables: dict[str, str]
    output: str | None
    where: str

    @property
    def name(self) -> str:
        """The program."""
        return self.words[0]

    def begins(self, beginnings: tuple[str, ...]) -> bool:
        """Whether it begins with the words of one of these."""
        return any(list(self.words[: len(one.split())]) == one.split() for one in beginnings)


def command_lines(block: Block) -> list[CommandLine]:
    """The commands of a shell block; of a console block those after a ``$``. Raises ValueError for what is no command line."""
    found, pending, first = [], "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        prompt = line.startswith("$ ")
        if block.language == "console" and not (prompt or pending):
            continue
        first = first if pending else number
        pending += line.removeprefix("$ ") if prompt else line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = split(pending)
        except ValueError:  # a quotation goes on in the next line
            pending += "\n"
            continue
        pending = ""
        found += [command(part, f"{block.page}:{first}") for part in parts(words)]
    if pending.strip():
        raise ValueError(f"{block.page}:{first}: this command line does not end")
    return found


def split(line: str) -> list[str]:
    """The words of a command line without its comment; signs of the shell outside of quotations are words of their own."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    reader.whitespace_split, reader.commenters = True, "#"
    return list(reader)


def parts(words: list[str]) -> list[list[str]]:
    """The commands that ``&&`` joins."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return [part for part in found if part]


def command(words: list[str], where: str) -> CommandLine:
    """One command of its words."""
    variables: dict[str, str] = {}
    while words and ASSIGNMENT.match(words[0]):
        name, _, value = words[0].partition("=")
        variables[name], words = value, words[1:]
    output = None
    if len(words) > 2 and words[-2] == ">":
        output, words = words[-1], words[:-2]
    if not words or any(set(word) <= set("&|;<>") for word in words):
        raise ValueError(f"{where}: this is no single command: {' '.join(words)}")
    if words[:1] == ["winnowkv"] or (words[:1] in (["python"], ["python3"]) and words[1:3] == ["-m", "winnowkv"]):
        words = ["winnow", *words[1 if words[0] == "winnowkv" else 3 :]]  # the same command
    return CommandLine(tuple(words), variables, output, where)
