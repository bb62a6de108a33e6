"""A running ComfyUI in one of the settings, asked over HTTP and heard over a websocket. Loaded by path."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from comfy_tests_browser import WebSocket
from comfy_tests_core import Comfy, command, environment
from comfy_tests_settings import PACK
from PIL import Image
from safetensors.torch import load_file

PACK_NAME = "ComfyUI-DC-Gen"
NODES = {"test_dump": "dump.py", "ComfyUI-nunchaku": "nunchaku.py"}
DYNAMIC = "dynamic VRAM on the CPU (test shim)"
CLIENT = "tests"


class Listener:
    """A websocket to a server, read in a thread: the previews and progress that a browser would get."""

    def __init__(self, port: int, client_id: str):
        self.previews: list[np.ndarray] = []
        self.messages: list[dict] = []
        self.changed = threading.Condition()
        self.socket = WebSocket("127.0.0.1", port, f"/ws?clientId={client_id}")
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error):
            while True:
                kind, data = self.socket.receive()
                with self.changed:
                    if kind == 1:
                        self.messages.append(json.loads(data))
                    elif kind == 2 and (start := data.find(b"\xff\xd8")) >= 0:  # a JPEG after the event's header
                        self.previews.append(np.asarray(Image.open(io.BytesIO(data[start:])).convert("RGB")))
                    self.changed.notify_all()

    def until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Whether a condition became true, asked after every message."""
        with self.changed:
            return bool(self.changed.wait_for(condition, seconds))

    def close(self) -> None:
        self.socket.close()
        self.thread.join(5)


class Heard:
    """What a listener got since a moment."""

    def __init__(self, listener: Listener):
        self.listener = listener
        with listener.changed:
            self.start = len(listener.messages), len(listener.previews)

    @property
    def messages(self) -> list[dict]:
        return self.listener.messages[self.start[0] :]

    @property
    def previews(self) -> list[np.ndarray]:
        return self.listener.previews[self.start[1] :]

    def until(self, wanted: Callable[[dict], bool], seconds: float) -> None:
        """Wait for a message."""
        if not self.listener.until(lambda: any(map(wanted, self.messages)), seconds):
            pytest.fail(f"not said within {seconds:g} s; said were {[m['type'] for m in self.messages]}")


class Server:
    """A running ComfyUI with its own base directory, in which the pack is linked as a user would install it."""

    def __init__(self, comfy: Comfy, base: Path, flags: tuple[str, ...] = ()):
        self.base = base
        self._lay_out()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        started = command(
            comfy.setting,
            comfy.root / "main.py",
            *("--cpu", "--port", str(self.port), "--base-directory", str(base), "--user-directory", str(base / "user")),
            *("--database-url", f"sqlite:///{base / 'comfy.db'}", "--disable-api-nodes", "--disable-auto-launch"),
            *flags,
        )
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(started, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            self._wait_until_up()
            self._check(comfy.mode)
            self.listener = Listener(self.port, CLIENT)
        except BaseException:
            self._stop()
            raise

    def _lay_out(self) -> None:
        for name in ("custom_nodes", "user", "output"):
            (self.base / name).mkdir(parents=True)
        # Else dialogs lie over the canvas: the template browser at first, then offers to download models.
        settings = self.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir()
        quiet = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
        settings.write_text(json.dumps(quiet))
        (self.base / "custom_nodes" / PACK_NAME).symlink_to(PACK, target_is_directory=True)
        for name, file in NODES.items():
            (self.base / "custom_nodes" / name).mkdir()
            source = Path(__file__).with_name("custom_nodes") / file
            (self.base / "custom_nodes" / name / "__init__.py").symlink_to(source)

    def _wait_until_up(self, seconds: float = 600) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            if self.process.poll() is not None:
                pytest.fail(f"ComfyUI stopped while starting:\n{self.log()[-4000:]}", pytrace=False)
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        pytest.fail(f"ComfyUI did not answer within {seconds:g} s:\n{self.log()[-4000:]}", pytrace=False)

    def _check(self, mode: str) -> None:
        """The pack has loaded, in the mode that was asked for."""
        log = self.log()
        failed = [line for line in log.splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
        assert not failed, f"the pack did not load:\n{log[-6000:]}"
        assert (DYNAMIC in log) == (mode == "dynamic"), f"not in mode {mode}:\n{log[-6000:]}"

    def log(self) -> str:
        """Everything the server has printed so far, without colour codes."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text(errors="replace"))

    def raw(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.raw(path))

    def post(self, path: str, body: dict) -> dict:
        """POST; an HTTP error comes back as {"http_error": code, ...body}."""
        try:
            return json.loads(self.raw(path, body) or b"{}")
        except urllib.error.HTTPError as error:
            return {"http_error": error.code, **json.loads(error.read() or b"{}")}

    def start(self, prompt: dict) -> str:
        """Queue an API-format prompt; its id. A prompt refused outright fails the test."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": CLIENT})
        if "prompt_id" not in answer:
            pytest.fail(f"ComfyUI refused the graph: {json.dumps(answer)[:3000]}", pytrace=False)
        return answer["prompt_id"]

    def queue(self, prompt: dict, seconds: float = 180) -> dict:
        """Queue an API-format prompt, wait, and return its history entry. Fails on any error, naming the node."""
        entry = self.try_queue(prompt, seconds)
        if entry["status"]["status_str"] != "success":
            pytest.fail(f"the graph failed: {self.error(entry)}", pytrace=False)
        return entry

    def try_queue(self, prompt: dict, seconds: float = 180) -> dict:
        """Like queue, but hands an entry back that failed while running."""
        return self.wait(self.start(prompt), seconds)

    def wait(self, prompt_id: str, seconds: float = 180) -> dict:
        """The history entry of a prompt that `start` has queued, once the server has said that it is at its end.

        All that was said of the prompt, previews too, has been heard by then.
        """
        end = {"node": None, "prompt_id": prompt_id}

        def ended() -> bool:
            return self.process.poll() is not None or any(
                m["type"] == "executing" and m["data"] == end for m in self.listener.messages
            )

        if not self.listener.until(ended, seconds) or self.process.poll() is not None:
            code = self.process.poll()
            why = f"no result after {seconds:g} s" if code is None else f"ComfyUI stopped with exit code {code}"
            pytest.fail(f"{why}; the log ends:\n{self.log()[-3000:]}", pytrace=False)
        return self.entry(prompt_id)

    def entry(self, prompt_id: str) -> dict:
        """The history entry of a prompt that is at its end, whoever queued it."""
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def free(self, **what: bool) -> None:
        """POST /free, and wait until it has been done: the server does it at the end of a prompt at the latest."""
        self.raw("/free", what)
        self.queue({"nothing": {"class_type": "TestNothing", "inputs": {}}})

    def options(self, kind: str, name: str) -> list[str]:
        """What a node's input can be chosen from; old nodes give the list in place of a type."""
        (spec,) = (part[name] for part in self.get(f"/object_info/{kind}")[kind]["input"].values() if name in part)
        return spec[0] if isinstance(spec[0], list) else spec[1]["options"]

    @staticmethod
    def error(entry: dict) -> str:
        """The message of a failed history entry, "" if it succeeded."""
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                return f"{data['node_type']}: {data['exception_message']}"
            if kind == "execution_interrupted":
                return "interrupted"
        return ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[Heard]:
        """What the server sends from here on to the client that `queue` queues for."""
        yield Heard(self.listener)

    def images(self, entry: dict) -> dict[str, list[np.ndarray]]:
        """The pictures of a history entry as uint8 (H, W, 3), by node id."""
        found: dict[str, list[np.ndarray]] = {}
        for node_id, output in entry["outputs"].items():
            for image in output.get("images", []):
                data = self.raw("/view?" + urllib.parse.urlencode(image))
                found.setdefault(node_id, []).append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return found

    def dumped(self, name: str) -> np.ndarray:
        """The float images (B,H,W,3) that a TestDump node of that name wrote."""
        return load_file(self.base / "output" / f"{name}.safetensors")["images"].numpy()

    def install(self, file: Path, kind: str, name: str) -> str:
        """Link a file or folder into models/<kind> under a name, which comes back."""
        target = self.base / "models" / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(file, target_is_directory=file.is_dir())
        return name

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.listener.close()
        self._stop()


def frontend_flags() -> tuple[str, ...]:
    """Flags for the frontend that DCGEN_FRONTEND_ROOT names; ComfyUI's own where it is not set."""
    root = os.environ.get("DCGEN_FRONTEND_ROOT")
    return ("--front-end-root", root) if root else ()
