"""Run one workflow in a ComfyUI on this machine, over HTTP: found, started, asked, stopped. Never imports comfy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from dcgen.jsons import parse_object

PACK = Path(__file__).resolve().parents[1]
LINK = "ComfyUI-DC-Gen"
PYTHONS = (
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)
WAIT = 180.0  # seconds for the server to answer


def find_comfyui() -> Path | None:
    """The first of COMFYUI_PATH (several as in PATH), the ComfyUI this pack is installed in, ~/ComfyUI, ~/ComfyUI-* and
    ~/comfy/ComfyUI; None when there is none."""
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)
    places = [Path(place).expanduser() for place in named if place]
    usual = [PACK.parents[1], Path.home() / "ComfyUI", *sorted(Path.home().glob("ComfyUI-*"))]
    for place in [*places, *usual, Path.home() / "comfy" / "ComfyUI"]:
        if (place / "main.py").is_file() and (place / "comfy" / "model_patcher.py").is_file():
            return place.resolve()
    return None


def interpreter(comfyui: Path) -> str:
    """ComfyUI's own Python; that of the portable ComfyUI for Windows lies beside its folder."""
    for name in PYTHONS:
        if (comfyui / name).exists():
            return str(comfyui / name)
    return sys.executable


def link_folder(link: Path, target: Path) -> None:
    """A link to a folder. Windows lets only some users make symbolic links, and everybody a junction."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi

        _winapi.CreateJunction(str(target), str(link))


class ComfyServer:
    """A ComfyUI server with a folder of its own (nothing is left in the user's), in which this pack is linked."""

    def __init__(self, comfyui: Path, *, cpu: bool = True) -> None:
        self.comfyui = comfyui
        self.cpu = cpu

    def __enter__(self) -> ComfyServer:
        self._folder = tempfile.TemporaryDirectory(prefix="dcgen-comfy-")
        self.folder = Path(self._folder.name)
        for name in ("custom_nodes", "user", "models/model_patches"):
            (self.folder / name).mkdir(parents=True)
        link_folder(self.folder / "custom_nodes" / LINK, PACK)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [interpreter(self.comfyui), str(self.comfyui / "main.py"), "--port", str(port)]
        command += ["--cpu"] if self.cpu else []
        command += ["--base-directory", str(self.folder), "--user-directory", str(self.folder / "user")]
        command += ["--database-url", f"sqlite:///{self.folder / 'comfy.db'}"]
        command += ["--disable-api-nodes", "--disable-auto-launch"]
        clean = {
            key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
        }
        self.log = self.folder / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=clean)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()

    def run(self, prompt: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """Run an API-format workflow: {"images": [bytes of PNG, ...], "seconds": float}. Errors quote the server."""
        started = time.perf_counter()
        history = self._finished(self._post("/prompt", {"prompt": prompt})["prompt_id"], timeout)
        if history["status"]["status_str"] == "error":
            raise RuntimeError(f"ComfyUI failed: {json.dumps(history['status']['messages'][-1])[:2000]}")
        names = [image for output in history["outputs"].values() for image in output.get("images", [])]
        images = [self._bytes("/view?" + urllib.parse.urlencode(image)) for image in names]
        return {"images": images, "seconds": time.perf_counter() - started}

    def failure(self, prompt: dict[str, Any], timeout: float = 300.0) -> tuple[str, bool]:
        """Run a workflow that is expected to fail: (its message, "" if it does not; whether it was refused unrun)."""
        try:
            number = self._post("/prompt", {"prompt": prompt})["prompt_id"]
        except RuntimeError as error:
            return str(error), True
        messages = self._finished(number, timeout)["status"]["messages"]
        return next((data["exception_message"] for kind, data in messages if kind == "execution_error"), ""), False

    def _finished(self, number: str, timeout: float) -> dict[str, Any]:
        """The history entry of a queued workflow, once it has succeeded or failed."""
        stop = time.perf_counter() + timeout
        while time.perf_counter() < stop:
            history: dict[str, Any] | None = self._get(f"/history/{number}").get(number)
            if history and (history["status"]["completed"] or history["status"]["status_str"] == "error"):
                return history
            time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not finish the workflow within {timeout:.0f} s")

    def stats(self) -> dict[str, Any]:
        """What the server says of its machine: versions, devices, free memory."""
        return self._get("/system_stats")

    def forget(self) -> None:
        """Let the server unload its models and drop its cached results before the next workflow."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def _wait(self) -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < WAIT:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at once:\n{self._tail()}")
            try:
                self._get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise TimeoutError(f"ComfyUI did not answer within {WAIT:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def _get(self, path: str) -> dict[str, Any]:
        return parse_object(self._bytes(path), self.url + path)

    def _bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def _post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return parse_object(answer.read() or b"{}", self.url + path)
        except urllib.error.HTTPError as error:
            raise RuntimeError(
                f"ComfyUI refused the workflow: {error.read().decode(errors='replace')[:2000]}"
            ) from error
