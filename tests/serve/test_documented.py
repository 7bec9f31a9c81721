"""What README and docs/serving.md say to type works against a real server of the embedded model."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT
from winnowkv.models import load as models

PORT = "127.0.0.1:8000"  # in the pages
TEXT = (
    "The archive of Oakham was founded in 1712 by Mary Lund, who wrote the history of the town. It has nine rooms. The last "
    "was built in 1850, and the key to it was lost at sea. "
) * 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model is missing ({models.INSTALL})"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server of the embedded model listens."""
    store = str(tmp_path_factory.mktemp("store"))
    given = ["serve", "--port", "0", "--kv-memory", "256MiB", "--store", store, "--max-rows", "4"]
    command = [sys.executable, "-c", "from winnowkv.cli import main; main()", *given]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        yield re.findall(r"on http://(\S+)", server.stdout.readline())[0]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def blocks(page: Path, language: str, heading: str = "") -> list[str]:
    """The fenced blocks of a page, after a heading and before the next one if it is given."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = re.split(r"(?m)^## ", text.split(f"\n## {heading}\n", 1)[1])[0]
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Serve"), ("docs/serving.md", "")])
def test_python_of_the_pages_runs(address: str, page: str, heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(ROOT / page, "python", heading)
    assert found
    names: dict[str, object] = {"text": TEXT}
    for block in found:
        assert PORT in block or "client" in names
        exec(compile(block.replace(PORT, address), page, "exec"), names)
    answer = names["answer"]
    assert answer.choices[0].message.content  # type: ignore[attr-defined]
    assert answer.usage.winnow["context"] == names["stored"]["id"]  # type: ignore[attr-defined, index]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("page", "language", "heading"), [("README.md", "", "Serve"), ("docs/serving.md", "sh", "")])
def test_curl_of_the_pages_is_answered(address: str, page: str, language: str, heading: str) -> None:
    lines = "\n".join(blocks(ROOT / page, language, heading)).replace("\\\n", " ").splitlines()
    commands = [line.replace(PORT, address) for line in lines if line.startswith("curl ")]
    assert commands
    for command in commands:
        done = subprocess.run(["sh", "-c", f"{command} --fail --silent"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert '"choices"' in done.stdout
