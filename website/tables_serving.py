"""Tables of docs/serving.md and of stored documents in vLLM: of the JSON of benchmarks/serve_*.py and vllm_speed.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

from website.records import Record
from website.tables import Records, markdown, table
from winnowkv.report import MIB

# Sides of benchmarks/serve_speed.py, and the record that each is in.
SIDES = {"full": "`--policy full`", "vllm": "vLLM", "winnow": "`winnow` at 12%"}
EQUAL = "`winnow:equal=true` at 12%"
MEGABYTE = 10**6
# Rows of the two tables of vllm_speed.py: work and figure there, as the pages say it.
OWN, ONE, FIRST, CACHED = "own documents", "one document", "first token", "first token, cached"
Line = Mapping[str, Any]


def digits(value: float) -> str:
    """A number with three digits that count, in thousands."""
    return f"{float(f'{value:.3g}'):,.0f}"


def percentiles(found: Line, scale: float) -> str:
    """p50 / p95 / p99."""
    return " / ".join(digits(scale * found[name]) for name in ("p50", "p95", "p99"))


def program(record: Record) -> str:
    """The command of a record's file as a page shows it: without how Python is started and how it prints."""
    command = str(record.get("command")).removeprefix("OMP_NUM_THREADS=1 ").removeprefix("python ")
    return f"`{command.removesuffix(' --json').removesuffix(' --out $OUT')}`"


def listed(texts: Iterable[str]) -> str:
    """``a, b and c``."""
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


@table
def streams(records: Records) -> str:
    """Streams and tokens a second of one memory, of benchmarks/serve_speed.py. The last side was measured by itself."""
    columns = [
        "server", "requests", "streams at once", "decode tokens/s", "tokens/s with prompts",
        "first token p50 / p95 / p99", "next token p50 / p95 / p99",
    ]  # fmt: skip
    rows = []
    for side, name in SIDES.items():
        line = records["serve-speed"].get(f"lines.side={side}")
        first, following = percentiles(line["first_token_s"], 1), percentiles(line["inter_token_s"], 1000)
        pace = f"{line['decode_tokens_s']:.1f}", f"{line['tokens_s']:.1f}"
        rows.append([name, line["streams"], line["at_once"], *pace, f"{first} s", f"{following} ms"])
    equal = records["serve-speed-equal"]
    line = equal.get("lines.side=equal")
    name = f"{EQUAL}, {equal.note}" if equal.note else EQUAL
    following = f"{digits(1000 * line['inter_token_s']['p50'])} ms at p50"
    rows.append([name, line["streams"], line["at_once"], f"{line['decode_tokens_s']:.1f}", "", "", following])
    return markdown(columns, rows)


@table
def serving_costs(records: Records) -> str:
    """What waiting, HTTP, stored documents and long answers cost: a question a row, each of a benchmark of its own."""
    rows = (stall(records), overhead(records), *stored(records), long_answers(records))
    return markdown(["question", "command", "result"], rows)


def stall(records: Records) -> list[str]:
    """benchmarks/serve_stall.py: medians over the rounds, with interleaving and without."""
    record = records["serve-stall"]
    lines, asked = record.get("lines"), record.get("arguments")

    def of(side: str, *path: str) -> float:
        found = [line for line in lines if line["interleave"] == side]
        return float(median(line[path[0]] if len(path) == 1 else line[path[0]][path[1]] for line in found))

    side = next(line["interleave"] for line in lines if line["interleave"] != "none")
    about = f"{asked['streams']} streams, {1000 * of(side, 'before_s', 'p50'):.0f} ms a token"
    waits = f"{of(side, 'during_s', 'max'):.3g} s; {of('none', 'during_s', 'max'):.3g} s without interleaving"
    first = f"{of(side, 'first_token_s'):.2f} and {of('none', 'first_token_s'):.2f} s"
    return [
        f"a running stream's longest wait while {int(asked['prompt_tokens']):,} tokens are read ({about})",
        "`benchmarks/serve_stall.py`", f"{waits}. The prompt's first token: {first}",
    ]  # fmt: skip


def overhead(records: Records) -> list[str]:
    """benchmarks/serve_overhead.py: tokens a second over HTTP and in a loop of the engine's steps."""
    record = records["serve-overhead"]
    served, bare = (record.get(f"summary.{side}.tokens_s") for side in ("served", "bare"))
    streams = record.get("arguments.streams")
    return [
        f"what HTTP costs over the bare engine, {streams} streams", program(record),
        f"{served:.1f} of {bare:.1f} tokens/s: {1 - record.get('ratio'):.1%} (medians)",
    ]  # fmt: skip


def stored(records: Records) -> list[list[str]]:
    """benchmarks/serve_contexts.py: the first token on a stored text beside the whole text sent again, and storing it."""
    record = records["serve-contexts"]
    made, asked = ({line["way"]: line for line in record.get(part)} for part in ("stored", "asked"))
    whole, hinted = asked["whole text"], asked["context, hinted"]
    rounds = "one round" if whole["times"] == 1 else f"{whole['times']} rounds"
    about = f"{record.note}, {rounds}" if record.note else rounds
    warm = [f"{asked[f'context, {way}']['first']:.3f} s {way}" for way in ("portable", "unequal", "hinted")]
    cold = [line["cold"] for line in asked.values() if line["cold"] is not None]
    took = {way: f"{line['elapsed']:.0f} s" for way, line in made.items()}
    sizes = listed(f"{size / MIB:.1f}" for size in sorted({line["bytes"] for line in made.values()}))
    return [
        [
            f"first token of a question on a stored text of {made['portable']['seen']:,} tokens ({about})", program(record),
            f"whole text sent again {whole['first']:.1f} s; context in memory {', '.join(warm)} "
            f"({hinted['times_faster']:.0f} times shorter); from its file {min(cold):.2f} to {max(cold):.2f} s",
        ],
        [
            "storing that text", "the same",
            f"{took['hinted']} with a hint, {took['portable']} studied and portable, {took['unequal']} unequal; {sizes} MiB",
        ],
    ]  # fmt: skip


def long_answers(records: Records) -> list[str]:
    """benchmarks/long_answers.py: bytes of long answers with a decode budget, and what is set aside without."""
    record = records["long-answers"]
    bounded, free = (next(x for x in record.get("lines") if (x["decode_budget"] is None) is none) for none in (False, True))
    sizes = [f"{size / MEGABYTE:.1f}" for size in bounded["held_bytes"].values()]
    marks = listed(f"{int(mark):,}" for mark in bounded["held_bytes"])
    held = sizes[0] if len(set(sizes)) == 1 else listed(sizes)
    return [
        f"four answers of {record.get('new'):,} tokens, `decode_budget` {bounded['decode_budget']}",
        "`benchmarks/long_answers.py`",
        f"{held} MB at {marks} tokens; {free['most_bytes'] / MEGABYTE:.1f} MB are set aside without",
    ]


def figure(record: Record, tokens: int, work: str, name: str) -> Line:
    """The row of vllm_speed.py with a figure of a work on documents of so many tokens."""
    return next(row for row in record.get("rows") if (row["document"], row["work"], row["figure"]) == (tokens, work, name))


def short(value: float) -> str:
    """Seconds with two digits that count, above ten with one after the point."""
    return f"{value:.1f}" if value >= 10 else f"{value:#.2g}"


def pace(value: float) -> str:
    """Tokens a second: one digit after the point if there are few."""
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def times(ratio: float) -> str:
    """How many times as good."""
    return f"{pace(ratio)}x"


@table
def vllm_speed(records: Records) -> str:
    """benchmarks.md: plain vLLM and stored contexts inside it, of ``benchmarks/vllm_speed.py --clock cpu``."""
    record = records["vllm-speed"]
    documents = list(dict.fromkeys(row["document"] for row in record.get("rows")))
    columns = ["", *(title for tokens in documents for title in (f"{tokens:,} tokens: vLLM", "contexts", ""))]
    rows: list[list[str]] = []
    asked = [figure(record, tokens, ONE, "tokens_s")["requests"]["context"] for tokens in documents]
    for work, name, label, form in VLLM_ROWS:
        if (work, name) == (ONE, "tokens_s"):
            rows.append([VLLM_CACHED, *[""] * (len(columns) - 1)])
        cells: list[str] = []
        for tokens in documents:
            row = figure(record, tokens, work, name)
            cells += [form(row["plain"]), form(row["context"]), gain(row)]
        rows.append([label.format(asked=", ".join(f"{count} requests" for count in asked)), *cells])
    return markdown(columns, rows)


def gain(row: Line) -> str:
    """How much better contexts are; steps of different batches are not compared."""
    if row["figure"] == "at_once":
        return f"{row['context'] / row['plain']:g}x"
    if row["figure"] == "step_ms":
        return times(row["plain"] / row["context"]) if row["work"] == ONE else ""
    return times(row["ratio"])


def milliseconds(value: float) -> str:
    """A step."""
    return f"{value:.0f} ms"


def seconds(value: float) -> str:
    """A first token."""
    return f"{short(value)} s"


VLLM_CACHED = "**plain vLLM's best case: all ask about one document, which is in its prefix cache**"
VLLM_ROWS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    (OWN, "at_once", "requests at once, each on its own document", str),
    (OWN, "tokens_s", "tokens a second of such a batch, vLLM's prompts included", pace),
    (OWN, "step_ms", "decode step of the largest batch", milliseconds),
    (OWN, "decode_tokens_s", "tokens a second of that step alone", pace),
    (FIRST, "first_s", "first token, nothing in vLLM's blocks", seconds),
    (ONE, "tokens_s", "tokens a second ({asked})", pace),
    (ONE, "step_ms", "decode step", milliseconds),
    (CACHED, "first_s", "first token", seconds),
)


@table
def vllm_gain(records: Records) -> str:
    """vllm.md: the rows of that table that decide, vLLM / on contexts."""
    record = records["vllm-speed"]
    documents = list(dict.fromkeys(row["document"] for row in record.get("rows")))

    def cells(work: str, name: str) -> list[str]:
        pairs = [figure(record, tokens, work, name) for tokens in documents]
        forms: dict[str, Callable[[Any], str]] = {"at_once": str, "decode_tokens_s": pace, "first_s": short}
        unit = " s" if name == "first_s" else ""
        return [f"{forms[name](row['plain'])} / {forms[name](row['context'])}{unit}" for row in pairs]

    return markdown(
        ["vLLM / on contexts", *(f"{tokens:,} tokens" for tokens in documents)],
        [
            ["requests at once, each on its own document", *cells(OWN, "at_once")],
            ["tokens a second of a decode step", *cells(OWN, "decode_tokens_s")],
            ["first token, nothing in vLLM's blocks", *cells(FIRST, "first_s")],
            ["first token, the document in vLLM's prefix cache", *cells(CACHED, "first_s")],
        ],
    )
