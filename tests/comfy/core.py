"""Functions of tests/comfy/inside/*.py run in ComfyUI's own interpreter; tensors travel as files. Loaded by path."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from comfy_tests_settings import PACK, Setting
from safetensors.torch import load_file, save_file

INSIDE = Path(__file__).resolve().parent / "inside"


def environment() -> dict[str, str]:
    """That of the tests without what would lead ComfyUI's interpreter astray or choose its mode."""
    drop = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "DCGEN_SIM_DYNAMIC_VRAM", "DCGEN_SIM_VRAM_FULL"}
    return {**{k: v for k, v in os.environ.items() if k not in drop}, "OMP_NUM_THREADS": "1"}


def command(setting: Setting, script: Path, *flags: str) -> list[str]:
    """How a script is started in a setting; main.py of a plain ComfyUI as a user starts it."""
    launch = [] if setting.mode == "legacy" else [str(INSIDE / "launch.py"), setting.mode]
    return [setting.python, *launch, str(script), *flags]


class Worker:
    """A process of ComfyUI's interpreter that does one job after another: its start costs more than most jobs."""

    def __init__(self, setting: Setting, flags: tuple[str, ...], base: Path, pack: Path = PACK):
        (base / "custom_nodes").mkdir(parents=True)
        self.log = base / "log.txt"
        started = command(setting, INSIDE / "runner.py", *flags, "--base-directory", str(base))
        where = {"DCGEN_COMFY": str(setting.root), "DCGEN_PACK": str(pack), "DCGEN_MODE": setting.mode}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                started,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment(), **where},
            )
        self.replies: queue.Queue[str] = queue.Queue()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.replies.put(line.strip())
        self.replies.put("ended")

    def do(self, work: Path, timeout: float) -> str:
        """Do the job in a folder: "done", "changed ..." where core is no longer what it was, or "ended"."""
        try:
            self.process.stdin.write(f"{work}\n")
            self.process.stdin.flush()
            return self.replies.get(timeout=timeout)
        except BrokenPipeError:
            return "ended"
        except queue.Empty:
            return f"no answer after {timeout:g} s"

    def close(self, seconds: float = 20) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.thread.join()
        self.process.stdout.close()


class Comfy:
    """A ComfyUI on this machine in one mode, and how to run a function of tests/comfy/inside/*.py in it."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.root, self.mode, self.version = setting.root, setting.mode, setting.version
        self.workers: dict[tuple[str, ...], Worker] = {}

    def run(
        self,
        where: str,
        tmp_path: Path,
        tensors: dict[str, torch.Tensor] | None = None,
        params: dict | None = None,
        flags: tuple[str, ...] = ("--cpu",),
        timeout: float = 850,
        alone: bool = False,
        pack: Path = PACK,
    ) -> tuple[dict[str, torch.Tensor], dict]:
        """Call `where` ("script:function") inside ComfyUI. Returns the tensors and the JSON it gave back.

        The function gets (name of the pack's package, tensors, params) and runs under inference mode. Processes are
        shared by the calls with the same flags. One in which something of core was replaced ends after the call;
        `alone`: the call must also have a fresh one, as one with another copy of the pack must.
        """
        script, function = where.split(":")
        work = tmp_path / f"job-{time.monotonic_ns()}"
        work.mkdir(parents=True)
        if tensors:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / "in.safetensors")
        job = {"script": str(INSIDE / f"{script}.py"), "function": function, "params": params or {}}
        (work / "job.json").write_text(json.dumps(job))
        worker = None if alone else self.workers.pop(flags, None)
        worker = worker or Worker(self.setting, flags, work / "base", pack)
        said = len(worker.log.read_text(errors="replace"))
        answer = worker.do(work, timeout)
        if answer == "done" and not alone:
            self.workers[flags] = worker
        else:
            worker.close(0 if answer.startswith("no answer") else 20)
        if not answer.startswith(("done", "changed")):
            lines = worker.log.read_text(errors="replace")[said:]
            pytest.fail(
                f"{where} failed inside ComfyUI ({answer}, exit code {worker.process.returncode}):\n{lines[-8000:]}",
                pytrace=False,
            )
        return load_file(work / "out.safetensors"), json.loads((work / "out.json").read_text())

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
