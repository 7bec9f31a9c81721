"""Files of users: read strictly, with errors in one sentence, and written whole or not at all.

A JSON or YAML file may be anything: cut off, nested without end, with numbers that no tensor holds, or with half a
character in a text. What passes here is plain data that every later step can compare, print and write again.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import secrets
import stat
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from winnowkv.errors import WinnowError

DEEPEST = 64  # levels of lists and mappings in a file; ours have six
MOST_YAML_VALUES = 100_000  # of one file, those of repeated anchors counted each time
LARGEST_WHOLE = 2**63  # whole numbers above it fit no tensor
SHOWN, LONGEST_SHOWN = 60, 200  # characters of a text in an error message, and of any value
Fail = Callable[[str], WinnowError]  # makes the error of a reason
Place = tuple[Any, Any] | None  # where a value stands: the place of what holds it, and its key there


def read_text(source: Any, fail: Fail) -> str:
    """The text of a UTF-8 file (a path, or a file of the package), without a byte order mark, lines ended by ``\\n``."""
    return plain_lines(decode(read_bytes(source, fail), fail))


def plain_lines(text: str) -> str:
    """A text whose lines end by ``\\n``, whatever ended them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(source: Any, fail: Fail) -> bytes:
    """The bytes of a file. Raises the error that ``fail`` makes of the reason if it cannot be read."""
    try:
        found: bytes = source.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no file has a name with a zero byte
        raise fail(f"cannot be read: {reason(error)}") from None
    return found


def decode(data: bytes, fail: Fail) -> str:
    """Bytes as UTF-8 text, without a byte order mark; the error names the line of the first byte that is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fail(f"line {line} is not UTF-8 text") from None


def parse_json(text: str | bytes, fail: Fail) -> Any:
    """JSON, strictly.

    ``fail`` makes the error of what is wrong: no JSON, a key twice in one object, NaN or Infinity, a whole number beyond
    64 bits, half a character, nested deeper than :data:`DEEPEST`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise fail(f"not JSON ({error.msg} at {place})") from None
    except RecursionError:
        raise fail(f"nested more than {DEEPEST} levels deep") from None
    except _TwiceError as error:
        raise fail(f"key {shown(error.args[0])} stands twice in one object") from None
    except UnicodeDecodeError:
        raise fail("not UTF-8 text") from None
    except ValueError:  # from int()
        raise fail(f"a whole number has more digits than {LARGEST_WHOLE}") from None
    check_plain(value, fail)
    return value


class _TwiceError(ValueError):
    """A key that stands twice in one object: readers would differ in which value counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return made


def parse_yaml(text: str, fail: Fail) -> Any:
    """YAML of plain data, with the same rules as :func:`parse_json`, and no more than :data:`MOST_YAML_VALUES` values."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((value for tag, value in keys if keys.count((tag, value)) > 1), None):
                raise _TwiceError(twice)
            made: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return made

    try:
        value = yaml.load(text, Strict)
    except yaml.YAMLError as error:
        raise fail(f"is not YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise fail(f"is nested more than {DEEPEST} levels deep") from None
    except _TwiceError as error:
        raise fail(f"has the key {shown(error.args[0])} twice in one mapping") from None
    except Exception as error:  # what its constructors raise for a scalar of the wrong form is anything
        raise fail(f"is not YAML: {reason(error)}") from None
    check_plain(value, fail, MOST_YAML_VALUES)
    return value


def check_plain(value: Any, fail: Fail, most: float = math.inf) -> None:
    """Raise what ``fail`` makes of the first thing in parsed JSON or YAML that is no plain, finite data; names its place."""
    todo: list[tuple[Any, int, Place]] = [(value, 0, None)]
    count = 0
    while todo:
        one, depth, place = todo.pop()
        count += 1
        if depth > DEEPEST or count > most:
            raise fail(f"nested more than {DEEPEST} levels deep" if depth > DEEPEST else f"more than {most} values")
        if isinstance(one, dict):
            todo += [(key, depth + 1, (place, key)) for key in one]
            todo += [(part, depth + 1, (place, key)) for key, part in one.items()]
        elif isinstance(one, list):
            todo += [(part, depth + 1, (place, at)) for at, part in enumerate(one)]
        elif fault := _fault(one):
            raise fail(f"{_words(place)}{fault}")


def _fault(one: Any) -> str | None:
    if isinstance(one, str):
        return None if one.isascii() or _whole(one) else "the text holds half a character (a lone surrogate)"
    if isinstance(one, bool) or one is None:
        return None
    if isinstance(one, int):
        return None if abs(one) < LARGEST_WHOLE else f"the whole number has more than 63 bits ({one.bit_length()})"
    if isinstance(one, float):
        return None if math.isfinite(one) else f"{one} is not a finite number"
    return f"{shown(one)} is not plain data but a {type(one).__name__}"  # dates and sets of YAML


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _words(place: Place) -> str:
    keys = []
    while place is not None:
        place, key = place
        keys.append(f"[{key}]" if isinstance(key, int) else shown(key))
    return f"field {' '.join(reversed(keys))}: " if keys else ""


def shown(value: Any) -> str:
    """A value in an error message: its repr, shortened."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number with more digits than Python prints, or an object without a repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN
_SHORT.maxlevel, _SHORT.maxlong, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 24, 4, 6, 6


def reason(error: BaseException) -> str:
    """What went wrong, in a line: of an OSError what the system says."""
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return str(text)[:300]


def first_fault(error: Any) -> str:
    """The first fault that pydantic found, in words: the field, what it should be, and its value."""
    found = error.errors(include_url=False)[0]
    own = found.get("ctx", {}).get("error")
    if isinstance(own, WinnowError):
        return str(own)
    field = " ".join(f"[{key}]" if isinstance(key, int) else str(key) for key in found["loc"])
    if found["type"] == "missing":
        return f"it lacks {field!r}"
    value = "" if found["type"] == "extra_forbidden" else f", not {shown(found['input'])}"
    return f"field {field}: {found['msg'][0].lower()}{found['msg'][1:]}{value}"


@contextmanager
def replacing(path: Path, fail: Fail, *, overwrite: bool = True) -> Iterator[Path]:
    """A new file beside ``path``, to be filled in the block; at its end it takes the place of ``path`` at once.

    A reader sees the old file or the new one, never a part; after an exception, a full disk included, the old one stands as
    it was and nothing is left. ``fail`` makes the error of what the system says, of a ``path`` that is no regular file
    (a folder, a device, a pipe), and of one that exists, unless ``overwrite`` is set.
    """
    try:
        target = Path(os.path.realpath(path))  # of a link the file that it names is replaced
        _check_target(target, fail, overwrite)
        scratch = target.parent / f".winnow-{secrets.token_hex(8)}.part"
        # Not tempfile: its files are readable by their owner only.
        os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except (OSError, ValueError) as error:
        raise fail(f"cannot be written: {reason(error)}") from None
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        _check_target(target, fail, overwrite)  # somebody may have been quicker
        if target.exists():
            os.chmod(scratch, stat.S_IMODE(target.stat().st_mode))
        os.replace(scratch, target)
    except OSError as error:
        raise fail(f"cannot be written: {reason(error)}") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _check_target(target: Path, fail: Fail, overwrite: bool) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise fail("is not a regular file: give the path of a new one")
    if not overwrite:
        raise fail("exists already: give another path, or overwrite=True")


def write_text(path: Path, text: str, fail: Fail) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path, fail) as scratch:
        scratch.write_text(text, encoding="utf-8")
