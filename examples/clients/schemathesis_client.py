"""schemathesis: requests drawn from the OpenAPI document, valid and not, to every endpoint; no 500, nothing undocumented.

By itself: ``schemathesis --config-file schemathesis.toml run http://127.0.0.1:8000/openapi.json``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import KEY, base_url, check

HERE = Path(__file__).parent
PHASES = {"examples": "the document's examples", "coverage": "limits of each field", "fuzzing": "drawn requests"}

with tempfile.TemporaryDirectory() as folder:
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(HERE / "schemathesis.toml"),
        "run", base_url().removesuffix("/v1") + "/openapi.json", "--phases", ",".join(PHASES), "--seed", "1",
        "--header", f"Authorization: Bearer {KEY}",
    ]  # fmt: skip
    ran = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, timeout=600
    )
    file = Path(folder) / "report.json"
    report = json.loads(file.read_text()) if file.exists() else {}

check("runs to its end", report.get("complete", False), ran.stdout[-3000:], ran.stderr[-3000:])
operations, cases = report["operations"], report["test_cases"]["generated"]
check(f"all {operations['total']} endpoints are tried", operations["tested"] == operations["total"] > 0, operations)
for phase, what in PHASES.items():
    status = report["phases"][phase]["status"]
    check(f"{phase}: {what}", status == "success", report["failures"], report["errors"], ran.stdout[-6000:])
posted = [rates for name, rates in report["valid_rates"].items() if name.startswith("POST")]
answered = all(sum(phase["accepted"] for phase in rates.values()) for rates in posted)
check(f"{cases} requests, no failure", ran.returncode == 0 and answered and cases > 100, posted)
