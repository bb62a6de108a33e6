"""A headless Chromium driven over its DevTools protocol, with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    named = os.environ.get("CHROMIUM_PATH")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


FORGET_TABS = """
sessionStorage.clear();
Object.keys(localStorage).filter((key) => /workflow/i.test(key)).forEach((key) => localStorage.removeItem(key));
"""

# Where on an element to try, as shares of its width or height: its middle first, then outwards.
SHARES = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9)
# Points of an element at shares of its width and height.
GRID = """
((element, xs, ys) => {
  const r = element.getBoundingClientRect();
  return ys.flatMap((y) => xs.map((x) => [r.x + x * r.width, r.y + y * r.height]));
})
"""
# Whether a pointer there is over an element, and not over something else that the page has laid upon it.
FREE = "((element, [x, y]) => element.contains(document.elementFromPoint(x, y)))"


class WebSocket:
    """A websocket client: connect, send text, receive whole messages."""

    def __init__(self, host: str, port: int, path: str, timeout: float | None = None):
        self.socket = socket.create_connection((host, port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        while self.stream.readline().strip():
            pass

    def send(self, text: str) -> None:
        data, mask = text.encode(), os.urandom(4)
        if len(data) < 126:
            head = struct.pack(">BB", 0x81, 0x80 | len(data))
        elif len(data) < 1 << 16:
            head = struct.pack(">BBH", 0x81, 0x80 | 126, len(data))
        else:
            head = struct.pack(">BBQ", 0x81, 0x80 | 127, len(data))
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self.socket.sendall(head + mask + masked)

    def receive(self) -> tuple[int, bytes]:
        """(opcode, payload) of the next message; fragments are joined."""
        kind, whole = 0, b""
        while True:
            head, size = struct.unpack(">BB", self.stream.read(2))
            if size > 125:
                size = struct.unpack(">H" if size == 126 else ">Q", self.stream.read(2 if size == 126 else 8))[0]
            whole += self.stream.read(size)
            kind = kind or head & 15
            if head & 0x80:
                return kind, whole

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, program: str, folder: Path, width: int = 1600, height: int = 1000):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        flags += [f"--user-data-dir={folder}", f"--window-size={width},{height}", "--no-first-run", "about:blank"]
        self.process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ready = folder / "DevToolsActivePort"
        stop = time.monotonic() + 60
        while not (ready.exists() and ready.read_text().count("\n") >= 1):
            if time.monotonic() > stop or self.process.poll() is not None:
                raise RuntimeError("Chromium did not start")
            time.sleep(0.1)
        port = int(ready.read_text().splitlines()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
            page = next(target for target in json.loads(answer.read()) if target["type"] == "page")
        path = page["webSocketDebuggerUrl"].split(f":{port}", 1)[1]
        self.socket = WebSocket("127.0.0.1", port, path, timeout=180)
        self.count = 0
        self.errors: list[str] = []
        self.dragged: list[dict] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """A DevTools command; its result. Uncaught page errors met meanwhile are collected in `errors`."""
        number = self._send(method, **params)
        while True:
            message = json.loads(self.socket.receive()[1])
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            if message.get("method") == "Input.dragIntercepted":
                self.dragged.append(message["params"]["data"])
            if message.get("method") == "Page.javascriptDialogOpening":  # whether to leave unsaved work
                self._send("Page.handleJavaScriptDialog", accept=True)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _send(self, method: str, **params) -> int:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        return self.count

    def open(self, url: str) -> None:
        """Go there without the tabs of earlier pages, which would be opened again and slow the page down."""
        with contextlib.suppress(RuntimeError):  # the first page has nothing to forget
            self.js(FORGET_TABS)
        self.call("Page.navigate", url=url)

    def js(self, expression: str):
        """The value of a JavaScript expression; promises are awaited."""
        found = self._result("Runtime.evaluate", expression=expression, objectGroup="js")
        if "objectId" not in found:
            return found.get("value")
        # A promise that only the page holds can be collected before it is fulfilled; one with an id is kept.
        if found.get("subtype") == "promise":
            found = self._result("Runtime.awaitPromise", promiseObjectId=found["objectId"], returnByValue=True)
        else:
            itself = {"functionDeclaration": "function () { return this; }", "objectId": found["objectId"]}
            found = self._result("Runtime.callFunctionOn", **itself, returnByValue=True)
        self.call("Runtime.releaseObjectGroup", objectGroup="js")
        return found.get("value")

    def _result(self, method: str, **params) -> dict:
        """What a command of the Runtime domain gives back; what the page throws is raised."""
        found = self.call(method, **params)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"]

    def until(self, expression: str, seconds: float = 60):
        """Wait until an expression is true; its value."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            with contextlib.suppress(RuntimeError):
                value = self.js(expression)
                if value:
                    return value
            time.sleep(0.2)
        raise TimeoutError(f"never true: {expression}")

    def still(self, expression: str, frames: int = 20) -> None:
        """Wait until an expression has had the same value for so many frames of the page, which moves things slowly."""
        self.js(
            "new Promise((done) => { let last = null, same = 0; const look = () => {"
            f"const now = JSON.stringify({expression}); same = now === last ? same + 1 : 0; last = now;"
            f"same < {frames} ? requestAnimationFrame(look) : done(true); }}; look(); }})"
        )

    def frame(self) -> None:
        """Wait until the page has drawn a frame."""
        self.js("new Promise((done) => requestAnimationFrame(() => done(true)))")

    def reach(
        self, element: str, xs: Sequence[float] = SHARES, points: str = "", seconds: float = 30
    ) -> tuple[float, float]:
        """A point of an element that the pointer reaches: panels and messages of the page may lie over others.

        Tried are shares `xs` of its width, or `points` (JavaScript) on the page.
        """
        points = points or f"{GRID}({element}, {list(xs)}, {list(SHARES)})"
        try:
            return tuple(self.until(f"{points}.find((point) => {FREE}({element}, point))", seconds))
        except TimeoutError:
            over = f"document.elementFromPoint(...{points}[0])"
            said = self.js(f"[{over}?.outerHTML.slice(0, 200), {over}?.innerText.slice(0, 200)]")
            raise TimeoutError(f"the pointer does not reach {element}; over it lies {said}") from None

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        """One mouse event ("mouseMoved", "mousePressed", "mouseReleased"); held: the left button is down."""
        button = "none" if kind == "mouseMoved" and not held else "left"
        clicks = 0 if kind == "mouseMoved" else 1
        event = {"x": x, "y": y, "button": button, "buttons": int(held), "clickCount": clicks}
        self.call("Input.dispatchMouseEvent", type=kind, **event)

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        """Press, move in steps, release, as a hand does."""
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, held=True)
        for i in range(1, steps + 1):
            share = i / steps
            self.mouse("mouseMoved", *(a + (b - a) * share for a, b in zip(start, end, strict=True)), held=True)
            self.frame()  # so that the page sees a movement and not a jump
        self.mouse("mouseReleased", *end)

    def drop(self, place: Callable[[], tuple[float, float]], end: tuple[float, float], tries: int = 5) -> None:
        """Drag an element of the page (the browser's own drag and drop) and let it go over another place.

        place: its middle on the page, asked anew for each try; a page that is busy may miss a press.
        """
        self.call("Input.setInterceptDrags", enabled=True)
        for _ in range(tries):
            start = place()
            self.mouse("mouseMoved", *start)
            self.mouse("mousePressed", *start, held=True)
            for step in range(40):
                if self.dragged:
                    break
                self.mouse("mouseMoved", start[0] + 5 + step % 5, start[1] + 5, held=True)
                self.frame()
            if self.dragged:
                break
            self.mouse("mouseReleased", *start)
        else:
            raise TimeoutError(f"nothing can be dragged at {start}")
        data = self.dragged.pop()
        self.dragged.clear()
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=end[0], y=end[1], data=data)
        self.mouse("mouseReleased", *end)
        self.call("Input.setInterceptDrags", enabled=False)

    def keys(self, text: str, *named: str) -> None:
        """Type text, then press keys by name ("Enter")."""
        self.call("Input.insertText", text=text)
        for name in named:
            code = {"Enter": 13, "Escape": 27}[name]
            for kind in ("keyDown", "keyUp"):
                event = {"key": name, "code": name, "windowsVirtualKeyCode": code, "text": "\r" if code == 13 else ""}
                self.call("Input.dispatchKeyEvent", type=kind, **event)

    def screenshot(self, file: Path) -> Path:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
