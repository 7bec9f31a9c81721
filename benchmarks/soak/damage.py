"""Ways to damage a file: its bytes, the values of its JSON or YAML, the header of a saved cache with a digest made anew."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

Damage = Callable[[bytes, random.Random], bytes]
RAW = "@raw:"  # a text that begins so stands in the file without its quotes
DEEP = 5000  # levels of nesting
WORDS = (
    b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"{}", b"[]", b'""', b"true", b"\x00", b"\xff\xfe", b"\xed\xa0\x80",
    b"\\ud800",
    b'"', b"{", b"[", b"}", b"]", b",", b":", b"\n", b"9" * 5000, b"[" * DEEP, b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"&a [*a]",
    b"!!python/name:os.system", b"!!timestamp x", b"!!int ''", b"- - -", b"? ", b"%YAML 9", b"---\n",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, -5, 3.5, -0.0, 1e308, 10**12, 2**31, 2**63, -(2**63), 10**30, "", " ", "x", "full", "0",
    "\ud800", "\x00", "ä" * 300, [], {}, [None], [[]], {"": None}, {"a": {"b": [1]}}, f"{RAW}NaN", f"{RAW}Infinity",
    f"{RAW}1e999",
    f"{RAW}{'9' * 5000}", f"{RAW}-{'9' * 5000}", f"{RAW}{'[' * DEEP}{']' * DEEP}", f"{RAW}" + '{"a":' * DEEP + "1" + "}" * DEEP,
    f"{RAW}[{'0,' * 3000}0]", f'{RAW}{{"a":1,"a":2}}', f"{RAW}0x1F", f"{RAW}1_0", f"{RAW}'x'",
)  # fmt: skip


# Of bytes.
def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit."""
    out = bytearray(data)
    at = draw.randrange(len(out))
    out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def flip_many(data: bytes, draw: random.Random) -> bytes:
    """Up to twenty bits."""
    for _ in range(draw.randint(2, 20)):
        data = flip(data, draw)
    return data


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end, the beginning or a part between is missing."""
    begin, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice((data[:begin], data[end:], data[:begin] + data[end:]))


def splice(data: bytes, draw: random.Random) -> bytes:
    """A part stands somewhere else, too, or in place of another."""
    begin, end, at = draw.randrange(len(data)), draw.randrange(len(data)), draw.randrange(len(data) + 1)
    part = data[min(begin, end) : max(begin, end)][:4000]
    return data[:at] + part + data[at + draw.choice((0, len(part))) :]


def put(data: bytes, draw: random.Random) -> bytes:
    """A word that is awkward somewhere, or noise, or zeros."""
    at = draw.randrange(len(data) + 1)
    word = draw.choice((draw.choice(WORDS), draw.randbytes(draw.randint(1, 40)), bytes(draw.randint(1, 64))))
    return data[:at] + word + data[at + draw.choice((0, len(word))) :]


def whole(data: bytes, draw: random.Random) -> bytes:
    """The whole file is something else."""
    return draw.choice(
        (b"", b"\n", b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data + data, b"null", b"[]", b"{}", b'"x"', b"0",
         b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, data[::-1], data.decode("latin-1").encode("utf-16"), bytes(len(data)))
    )  # fmt: skip


BYTES: tuple[Damage, ...] = (flip, flip_many, cut, splice, put, whole)


# Of values.
def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of parsed JSON stands, the whole of it included."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def change(value: Any, draw: random.Random) -> Any:
    """One value is another one, is missing, is there twice, or has changed places with one beside it."""
    value = copy.deepcopy(value)
    every = [path for path in places(value) if path]
    if not every:
        return draw.choice(VALUES)
    # As likely a table's row or the table as one of its hundreds of numbers.
    depth = draw.choice(sorted({len(path) for path in every}))
    *path, last = draw.choice([path for path in every if len(path) == depth])
    holder = value
    for key in path:
        holder = holder[key]
    how = draw.randrange(8)
    if how == 0:
        del holder[last]
    elif how == 1 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    elif how == 1:
        holder[f"{last}2"] = holder[last]
    elif how == 2:
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    elif how == 3 and isinstance(holder[last], int | float):
        holder[last] = draw.choice((holder[last] + 1, holder[last] - 1, -holder[last], holder[last] * 2, str(holder[last])))
    elif how == 3 and isinstance(holder[last], list | dict):
        holder[last] = type(holder[last])()
    else:
        holder[last] = draw.choice(VALUES)
    return value


def dumped(value: Any, **options: Any) -> str:
    """JSON of a value in which texts that begin with :data:`RAW` stand without their quotes."""
    text = json.dumps(value, **options)
    return re.sub(rf'"{RAW}((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text)


def change_json(data: bytes, draw: random.Random) -> bytes:
    """A value of a JSON file."""
    return dumped(change(json.loads(data), draw)).encode()


def change_line(data: bytes, draw: random.Random) -> bytes:
    """A value of a line of a JSONL file."""
    lines = data.decode().split("\n")[:-1]
    at = draw.randrange(len(lines))
    lines[at] = dumped(change(json.loads(lines[at]), draw))
    return "".join(f"{line}\n" for line in lines).encode()


def change_yaml(data: bytes, draw: random.Random) -> bytes:
    """A value of a YAML file, written as JSON, which is YAML, or as YAML."""
    changed = change(yaml.safe_load(data), draw)
    if draw.random() < 0.5:
        return dumped(changed).encode()
    bomb = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))
    return yaml.safe_dump(changed).encode("utf-8", "surrogatepass") + draw.choice((b"", b"", b"", bomb.encode()))


# Of a saved cache.
DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


def reseal(header: dict[str, Any] | str, body: bytes) -> bytes:
    """A safetensors file with this header, whose digest is right again: what somebody could write who knows the format."""
    text = header if isinstance(header, str) else dumped(header, separators=(",", ":"))
    raw = DIGEST.sub(b'"digest":"' + b"0" * 64 + b'"', text.encode("utf-8", "surrogatepass"))
    raw += b" " * (-len(raw) % 8)
    data = len(raw).to_bytes(8, "little") + raw + body
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(b'"digest":"' + b"0" * 64, b'"digest":"' + digest, 1)


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the rest of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def forge_header(data: bytes, draw: random.Random) -> bytes:
    """A value of what a saved cache says of itself; the digest is right."""
    header, body = opened(data)
    about = header["__metadata__"]
    about["winnowkv"] = dumped(change(json.loads(about["winnowkv"]), draw))
    return reseal(header, body)


def forge_table(data: bytes, draw: random.Random) -> bytes:
    """Names, shapes, dtypes and places of a saved cache's tensors, or its metadata; the digest is right."""
    header, body = opened(data)
    names = [name for name in header if name != "__metadata__"]
    first, second = draw.choice(names), draw.choice(names)
    how = draw.randrange(5)
    if how == 0:  # names exchanged: of keys and values, of two layers
        header[first], header[second] = header[second], header[first]
    elif how == 1:
        header[first]["shape"] = draw.sample(header[first]["shape"], len(header[first]["shape"]))
    elif how == 2:
        header[first]["dtype"] = draw.choice(("F32", "I32", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "I64", "X", ""))
    elif how == 3:
        header[first]["data_offsets"] = list(header[second]["data_offsets"])
    else:
        return reseal(change(header, draw), body)
    return reseal(header, body)
