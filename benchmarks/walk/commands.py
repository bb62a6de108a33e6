"""README's two commands on a machine that has nothing: a fresh clone and an empty home folder. Their times and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.comfy_client import PACK

STEPS = {
    "setup": ["make", "ready"],  # what both commands do first
    "demo": ["make", "demo"],
    "test": ["make", "test"],
}
KEPT = (
    "PATH",
    "LANG",
    "TERM",
    "OMP_NUM_THREADS",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "HTTPS_PROXY",
    "SSL_CERT_FILE",
)


@dataclass(frozen=True)
class Command:
    """How one command ended. code: its exit code."""

    command: str
    seconds: float
    code: int
    last_line: str


def walk(names: list[str], folder: Path) -> Iterator[Command]:
    """Run the commands in this order in one clone; all they print goes to folder/NAME.log."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcgen-walk-", ignore_cleanup_errors=True) as place:
        clone, home = Path(place) / "ComfyUI-DC-Gen", Path(place) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(PACK), str(clone)], check=True)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"HOME": str(home), "PYTHON": sys.executable}
        for name in names:
            started, log = time.perf_counter(), folder / f"{name}.log"
            with open(log, "w", encoding="utf-8") as out:
                done = subprocess.run(
                    STEPS[name], cwd=clone, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False
                )
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1].replace(str(clone), ".") if lines else ""
            yield Command(" ".join(STEPS[name]), time.perf_counter() - started, done.returncode, last)


def table(commands: list[Command]) -> str:
    """Markdown: minutes and exit code of each command."""
    lines = ["| command | minutes | exit code | last line |", "|---|---|---|---|"]
    for one in commands:
        lines.append(f"| `{one.command}` | {one.seconds / 60:.1f} | {one.code} | {one.last_line[:120]} |")
    return "\n".join(lines)


def as_json(commands: list[Command]) -> list[dict[str, Any]]:
    return [asdict(one) for one in commands]
