"""Start ``winnow serve`` and run clients that no one here wrote against it: ``make clients``.

Runs in an environment of the clients (constraints-clients.txt), without torch; ``--server-python`` names the one with
winnowkv. Prints a table with a line for each thing that was checked, and exits with 1 if something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
# What is installed, and the script that uses it.
CLIENTS = {
    "openai": "openai_chat.py", "openai (errors)": "openai_errors.py", "langchain-openai": "langchain_client.py",
    "llm": "llm_client.py", "lm_eval": "lm_eval_client.py", "schemathesis": "schemathesis_client.py",
}  # fmt: skip
# float32, since in bfloat16 two likely tokens may tie, and what is greedy then depends on how many rows decode together.
SERVER = ["--port", "0", "--dtype", "float32", "--kv-memory", "512MiB", "--max-rows", "8", "--max-new-tokens", "64"]
LINE = re.compile(r"(ok|failed) +([0-9.]+) s  (.*)")
START_SECONDS = 180
CLIENT_SECONDS = 900


@contextmanager
def server(winnow: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """The address of a running server, which ends with the block."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*winnow, "serve", *SERVER], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )  # fmt: skip
    giving_up = threading.Timer(START_SECONDS, process.kill)
    giving_up.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline()  # comes once the model is loaded
        giving_up.cancel()
        found = re.search(r"http://\S+:\d+", first)
        if found is None:
            raise SystemExit(f"winnow serve did not start:\n{log.read_text()[-3000:]}")
        yield found[0]
    finally:
        giving_up.cancel()
        process.terminate()
        process.wait(60)


def run(client: str, arguments: list[str], environment: dict[str, str]) -> list[dict]:
    """What one client's script said, a row for each check; the last one has what went wrong, if anything did."""
    head = {"client": client, "version": version(client.split()[0])}
    try:
        ran = subprocess.run(
            [sys.executable, str(HERE / CLIENTS[client]), *arguments], env=environment, capture_output=True, text=True,
            timeout=CLIENT_SECONDS,
        )  # fmt: skip
        said, trouble, code = ran.stdout, ran.stderr, ran.returncode
    except subprocess.TimeoutExpired as error:
        said, trouble, code = (error.stdout or b"").decode(), f"not done after {CLIENT_SECONDS} s", 1
    found = [LINE.match(line) for line in said.splitlines()]
    rows = [head | {"check": one[3], "result": one[1], "seconds": float(one[2])} for one in found if one]
    if code and (not rows or rows[-1]["result"] == "ok"):
        rows.append(head | {"check": "ends without an error", "result": "failed", "seconds": 0.0})
    if code:
        rows[-1]["trouble"] = trouble[-6000:]
    return rows


def table(rows: list[dict]) -> str:
    """The rows in at most 80 columns."""
    lines = [f"{'client':16} {'version':7} {'check':42} {'result':6} {'s':>5}"]
    for row in rows:
        check = row["check"] if len(row["check"]) <= 42 else row["check"][:41] + "~"
        lines.append(f"{row['client']:16} {row['version']:7} {check:42} {row['result']:6} {row['seconds']:5.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server-python", default=sys.executable, help="Python of the environment with winnowkv")
    parser.add_argument("--only", nargs="*", choices=CLIENTS, default=list(CLIENTS), help="clients; all if left out")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    given = parser.parse_args()
    environment = os.environ | {"WINNOW_API_KEY": secrets.token_hex(16), "LANGSMITH_TRACING": "false"}
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # nothing may go elsewhere
        environment.pop(name, None)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "server.log")
        own = subprocess.run([given.server_python, str(HERE / "own_answer.py")], check=True, capture_output=True, text=True)
        answer.write_text(own.stdout)
        rows = []
        with server([str(Path(given.server_python).with_name("winnow"))], environment, log) as address:
            for client in given.only:
                rows += run(client, [f"{address}/v1", str(answer)], environment)
        broken = [line for line in log.read_text().splitlines() if '"error"' in line]
    failed = [row for row in rows if row["result"] != "ok"]
    if given.json:
        print(json.dumps({"seconds": round(time.perf_counter() - began, 1), "rows": rows, "server_errors": broken}, indent=1))
    else:
        print(table(rows))
        print(f"{len(rows)} checks, {len(failed)} failed, in {time.perf_counter() - began:.0f} s")
    for row in failed:
        print(f"\n{row['client']}: {row['check']}\n{row.get('trouble', '')}", file=sys.stderr)
    for line in broken:
        print(f"\nthe server's log has an error:\n{line[:3000]}", file=sys.stderr)
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
