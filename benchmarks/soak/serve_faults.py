"""``winnow serve`` under faults: killed, stopped under load, left by its clients, sent nonsense, slowed down, out of disk.

Each part starts a server of its own on the embedded model, in a process of its own:

- *killed*: ``kill -9`` in the middle of streams. Every client sees that its stream broke off; a new server answers.
- *stopped*: SIGTERM in the middle of streams. They end whole, new requests are refused with 503, and the exit code is 0.
- *left*: ``--count`` requests whose clients go, before the first token or after some. Nothing is active or held afterwards.
- *nonsense*: ``--count`` bodies, damaged by damage.py: bytes that are no UTF-8, broken JSON, values of all kinds. Each is
  answered with 200 or an error that names the request's id, never with 5xx.
- *large*: bodies of 10 MB, many at once: 413, and the process does not keep them.
- *slow*: connections that send a head or a body a byte at a time. Others are served meanwhile; these are closed in time.
- *full disk*: contexts that cannot be written (files of more than a megabyte fail): 507, nothing is left behind, and requests
  without a context go on.

    python benchmarks/soak/serve_faults.py [--count 1000] [--seed 0] [--part left] [--json out.json]

Exits with 1 on any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from damage import BYTES, change_json

from winnowkv.evaluate.needle.prompts import read_haystack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serve_client import EndedError, ask, head, make, parts, request, stream
from serve_servers import Served, parsed, winnow_server

BODY: dict[str, Any] = {"model": "embedded", "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
CHAT = {"model": "embedded", "messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 2, "temperature": 0}
TEXT = {"model": "embedded", "prompt": "One, two,", "max_tokens": 2, "stop": ["x"], "n": 1, "winnow": {"budget": 0.5}}
PLACES = "/v1/chat/completions", "/v1/completions"
STREAMS, LARGE, SLOW = 8, 16, 50
MEGABYTES = 10
KEPT = 64 * 2**20  # bytes by which a process may have grown after large bodies
WITHIN = 60.0  # seconds in which a slow connection must have been closed; the server's own limit is 30
NO_LARGE_FILES = (
    sys.executable, "-c",
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); os.execv(sys.argv[1], sys.argv[1:])",
)  # fmt: skip


class Faults:
    """What was counted, and sentences about what should not be."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder, self.count, self.seed = folder, count, seed
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []

    def check(self, good: bool, text: str) -> None:
        """Note a fault unless it is good."""
        if not good:
            self.found.append(text)
            print(f"fault: {text}", file=sys.stderr, flush=True)

    def server(self, name: str, *options: str, **more: Any) -> Any:
        """A server of the part's own."""
        return winnow_server(self.folder / f"faults-{name}.log", *options, **more)

    async def idle(self, served: Served, where: str) -> None:
        """Look whether nothing is active, waits or is held, and whether a request is answered."""
        for _ in range(100):
            now = parsed((await ask(served.port, "GET", "/metrics"))[1])
            left = [now[f"winnow_{name}"] for name in ("active_requests", "queue_length", "kv_bytes")]
            if not any(left):
                break
            await asyncio.sleep(0.1)
        self.check(not any(left), f"{where}: active, waiting and held are {left} afterwards")
        self.check((await stream(served.port, BODY | {"prompt": "After that", "max_tokens": 4})).whole, f"{where}: not served")

    def log(self, name: str) -> None:
        """Look whether the server's log has an error that was not expected."""
        text = (self.folder / f"faults-{name}.log").read_text(errors="replace")
        self.check("Traceback" not in text and '"level": "critical"' not in text, f"{name}: a traceback in the log")

    async def streams(self, served: Served, during: Any) -> list[Any]:
        """Streams, in the middle of which something happens."""
        calls = [asyncio.create_task(stream(served.port, BODY | {"prompt": "One", "max_tokens": 200})) for _ in range(STREAMS)]
        while parsed((await ask(served.port, "GET", "/metrics"))[1])["winnow_active_requests"] < STREAMS:
            await asyncio.sleep(0.05)
        during()
        return list(await asyncio.gather(*calls))

    def killed(self) -> None:
        """kill -9 in mid-stream."""
        with self.server("killed") as served:
            ended = asyncio.run(self.streams(served, served.process.kill))
            self.check(served.process.wait() == -signal.SIGKILL, "killed: another exit code")
        broken = [one for one in ended if one.error and not one.done]
        self.counts["streams of a killed server that broke off"] += len(broken)
        self.check(len(broken) == STREAMS, f"killed: {STREAMS - len(broken)} of {STREAMS} clients saw no error")
        with self.server("restarted") as served:
            asyncio.run(self.idle(served, "a server after a killed one"))

    def stopped(self) -> None:
        """SIGTERM under load."""
        refused: list[Any] = []

        async def under_load(served: Served) -> list[Any]:
            def stop() -> None:
                served.process.send_signal(signal.SIGTERM)
                refused.append(asyncio.get_running_loop().create_task(late(served)))

            return await self.streams(served, stop)

        async def late(served: Served) -> Any:
            while (await ask(served.port, "GET", "/ready"))[0] == 200:
                await asyncio.sleep(0.01)
            return await stream(served.port, BODY | {"prompt": "Late", "max_tokens": 2})

        async def both(served: Served) -> tuple[list[Any], Any]:
            ended = await under_load(served)
            return ended, await refused[0]

        with self.server("stopped", "--drain", "120") as served:
            ended, after = asyncio.run(both(served))
            code = served.process.wait(60)
        whole = [one for one in ended if one.whole and one.tokens == 200]
        self.counts["streams that ended whole after SIGTERM"] += len(whole)
        self.check(len(whole) == STREAMS, f"stopped: {STREAMS - len(whole)} of {STREAMS} streams did not end whole")
        self.check(after.status == 503 and after.retry_after is not None, f"stopped: a late request got {after.status}")
        self.check(code == 0, f"stopped: exit code {code}")
        self.log("stopped")

    def left(self) -> None:
        """Aborted requests."""
        draw = random.Random(self.seed)
        bodies = [BODY | {"prompt": f"{at} is", "max_tokens": 64, "n": draw.choice((1, 1, 2))} for at in range(self.count)]
        calls = [{"body": body, "abort_after": draw.randrange(4)} for body in bodies]

        async def leave(served: Served) -> None:
            ended = await make(served.port, calls, 32)
            self.counts["requests that clients left"] += sum(one.aborted for one in ended)
            bad = [one for one in ended if not one.aborted]
            self.check(not bad, f"left: {len(bad)} were not left, the first: {bad and (bad[0].status, bad[0].error)}")
            await self.idle(served, "left")

        with self.server("left") as served:
            asyncio.run(leave(served))
        self.log("left")

    def nonsense(self) -> None:
        """Damaged bodies."""
        draw, statuses = random.Random(self.seed), Counter[str]()

        async def send(served: Served, number: int) -> None:
            body = draw.choice((CHAT, TEXT))
            data = json.dumps(body).encode()
            data = draw.choice((*BYTES, change_json, change_json, change_json))(data, draw)
            kind = draw.choice(("application/json",) * 8 + ("text/plain", "application/json; charset=utf-16"))
            reader, writer = await request(served.port, "POST", PLACES[body is TEXT], data, {"content-type": kind})
            try:
                status, headers = await head(reader)
                said = b"".join([part async for part in parts(reader, headers)])
            except (EndedError, OSError, asyncio.IncompleteReadError) as error:
                status, headers, said = 0, {}, str(error).encode()
            writer.close()
            statuses[f"{status // 100}xx"] += 1
            named = status == 200 or (headers.get("x-request-id", "-") in said.decode("utf-8", "replace"))
            self.check(
                status in (200, 400, 404, 413, 422) and named, f"body {number}: {status} {said[:120]!r} for {data[:200]!r}"
            )

        async def every(served: Served) -> None:
            numbers = iter(range(self.count))

            async def client() -> None:
                for number in numbers:
                    await send(served, number)

            await asyncio.gather(*(client() for _ in range(8)))
            await self.idle(served, "nonsense")

        with self.server("nonsense", "--max-new-tokens", "8") as served:
            asyncio.run(every(served))
        self.counts.update({f"damaged bodies answered {name}": count for name, count in statuses.items()})
        self.log("nonsense")

    def large(self) -> None:
        """Bodies of 10 MB."""
        data = {"model": "embedded", "prompt": "x" * (MEGABYTES * 10**6)}

        async def send(served: Served) -> int:
            try:
                status, said = await ask(served.port, "POST", PLACES[1], data)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.check(False, f"large: {type(error).__name__}: {error}")
                return 0
            self.check(status == 413 and b"request_id" in said, f"large: {status} {said[:120]!r}")
            return status

        async def every(served: Served) -> None:
            await self.idle(served, "large")
            before = served.rss
            self.counts["bodies of 10 MB refused"] += (await asyncio.gather(*(send(served) for _ in range(LARGE)))).count(413)
            await self.idle(served, "large")
            grown = served.rss - before
            self.check(grown < KEPT, f"large: the process has grown by {grown / 2**20:.0f} MiB")

        with self.server("large") as served:
            asyncio.run(every(served))
        self.log("large")

    def slow(self) -> None:
        """Slow-loris clients."""

        async def drip(served: Served, number: int) -> float:
            begin, lines = time.monotonic(), f"POST {PLACES[1]} HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n"
            data = (lines + ("\r\n{" if number % 2 else "x-long: ")).encode()  # half of them drip into the body
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            closed = asyncio.create_task(reader.read())
            try:
                writer.write(data)
                while not closed.done() and time.monotonic() - begin < WITHIN:
                    writer.write(b"a")
                    await asyncio.wait({closed}, timeout=0.5)
            except OSError:
                pass
            finally:
                closed.cancel()
                writer.close()
            return time.monotonic() - begin

        async def every(served: Served) -> None:
            slow = [asyncio.create_task(drip(served, number)) for number in range(SLOW)]
            await asyncio.sleep(0.5)
            await self.idle(served, "beside slow connections")
            took = await asyncio.gather(*slow)
            self.counts["slow connections closed"] += sum(each < WITHIN for each in took)
            self.check(max(took) < WITHIN, f"slow: a connection was open for {max(took):.0f} s")
            await self.idle(served, "slow")

        with self.server("slow") as served:
            asyncio.run(every(served))
        self.log("slow")

    def full_disk(self) -> None:
        """Contexts that cannot be written."""
        store = self.folder / f"full-{time.time_ns()}"
        body = {"text": read_haystack()[:6000], "policy": "snapkv", "study": "none"}

        async def every(served: Served) -> None:
            for _ in range(3):
                status, said = await ask(served.port, "POST", "/v1/contexts", body)
                if status == 404:
                    self.counts["contexts are not served"] += 1
                    return
                self.counts["contexts refused on a full disk"] += status == 507
                self.check(status == 507 and b"request_id" in said, f"full disk: {status} {said[:200]!r}")
            status, said = await ask(served.port, "GET", "/v1/contexts")
            self.check(status == 200 and json.loads(said)["data"] == [], f"full disk: listed are {said[:200]!r}")
            await self.idle(served, "full disk")

        with self.server("full-disk", "--store", str(store.resolve()), wrap=NO_LARGE_FILES) as served:
            asyncio.run(every(served))
        files = (
            [path.name for path in store.rglob("*") if path.is_file() and path.stat().st_size > 4096] if store.exists() else []
        )
        self.check(not files, f"full disk: {files} are left")


PARTS = ("killed", "stopped", "left", "nonsense", "large", "slow", "full_disk")


def main() -> int:
    """Read the command line, run the parts, print."""
    asking = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asking.add_argument("--count", type=int, default=1000)
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given more than once")
    asking.add_argument("--out", type=Path, default=Path("winnow-out/soak"))
    asking.add_argument("--json", type=Path, help="write the counts to this file, too")
    asked = asking.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    faults = Faults(asked.out, asked.count, asked.seed)
    for part in asked.part or PARTS:
        begin = time.monotonic()
        getattr(faults, part)()
        print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    for name, count in sorted(faults.counts.items()):
        print(f" {name:44} {count:8,}")
    print(f"{len(faults.found)} faults")
    if asked.json:
        about = {"command": "soak/serve_faults", "seed": asked.seed, "counts": faults.counts, "faults": faults.found}
        asked.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if faults.found else 0


if __name__ == "__main__":
    sys.exit(main())
