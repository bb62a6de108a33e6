"""What differs on Windows and macOS, simulated: files in use, links, process groups, calls that other systems lack."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcgen.files
from dcgen.files import replacing
from train import comfy_client, distributed
from train.text_parts import text_identity

ROOT = Path(__file__).resolve().parents[1]


def held(number):
    """The error of Windows for a file that a program holds (32: open, 1224: mapped)."""
    error = OSError(errno.EINVAL if number == 1224 else errno.EACCES, "in use")
    error.winerror = number
    return error


@pytest.mark.parametrize("number", [5, 32, 1224])
def test_a_file_in_use_is_replaced_once_it_is_free(tmp_path, monkeypatch, number):
    waited, really = [], os.replace

    def replace(source, target):
        if len(waited) < 2:
            raise held(number)
        really(source, target)

    monkeypatch.setattr(dcgen.files.os, "replace", replace)
    monkeypatch.setattr(dcgen.files.time, "sleep", waited.append)
    with replacing(tmp_path / "x.safetensors") as path:
        path.write_bytes(b"new")
    assert (tmp_path / "x.safetensors").read_bytes() == b"new"
    assert waited == list(dcgen.files.REPLACE_PAUSES[:2])


def test_a_file_that_stays_in_use_is_named_with_what_to_do(tmp_path, monkeypatch):
    def replace(source, target):
        raise held(32)

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr(dcgen.files.os, "replace", replace)
    monkeypatch.setattr(dcgen.files.time, "sleep", lambda seconds: None)
    with (
        pytest.raises(OSError, match=r"x\.safetensors is in use by another program .*ComfyUI.*same command"),
        replacing(tmp_path / "x.safetensors") as path,
    ):
        path.write_bytes(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"old"


def test_another_error_is_not_waited_for(tmp_path, monkeypatch):
    def replace(source, target):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(dcgen.files.os, "replace", replace)
    monkeypatch.setattr(dcgen.files.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(PermissionError, match="no"), replacing(tmp_path / "x") as path:
        path.write_bytes(b"new")


def test_a_link_is_a_junction_where_symbolic_links_are_not_allowed(tmp_path, monkeypatch):
    def refused(self, target, target_is_directory=False):
        raise held(1314)

    made = []
    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(comfy_client.sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "_winapi", types.SimpleNamespace(CreateJunction=lambda *pair: made.append(pair)))
    comfy_client.link_folder(tmp_path / "link", ROOT)
    assert made == [(str(ROOT), str(tmp_path / "link"))]
    monkeypatch.setattr(comfy_client.sys, "platform", "linux")
    with pytest.raises(OSError, match="in use"):
        comfy_client.link_folder(tmp_path / "link", ROOT)


def test_the_python_of_a_portable_comfyui_is_found(tmp_path):
    python = tmp_path / "python_embeded" / "python.exe"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "ComfyUI").mkdir()
    assert Path(comfy_client.interpreter(tmp_path / "ComfyUI")).resolve() == python


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_one_process_makes_no_group(monkeypatch, variables):
    """NCCL does not exist on Windows, so training on one GPU must not ask for it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: pytest.fail("a group was made"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.start() == distributed.Ranks(0, 1, torch.device("cuda", 0))


@pytest.mark.parametrize(("nccl", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "cpu:gloo,cuda:gloo")])
def test_several_processes_take_nccl_where_it_exists(monkeypatch, nccl, backend):
    asked = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **k: asked.append((backend, k)))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.start("cuda").world == 2
    assert asked == [(backend, {"rank": 1, "world_size": 2})]


def test_several_processes_on_the_cpu_need_a_newer_torch_than_one(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cpu, "Stream", type("Stream", (), {}))  # as in torch 2.6
    with pytest.raises(RuntimeError, match=r"2 processes on the CPU need torch 2\.8 or newer"):
        distributed.start("cpu")


def test_digests_name_files_alike_on_every_system():
    parts = {"tokenizer": (), "text_encoder": ()}
    names = text_identity(ROOT / "toy" / "flux-base", parts)["files"]
    assert {"tokenizer/vocab.json", "text_encoder/model.safetensors"} <= set(names)
    code = [
        path.read_text(encoding="utf-8")
        for folder in ("train", "dcgen", "nodes")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert not [line for text in code for line in text.splitlines() if re.search(r"str\([\w.]*relative_to", line)]


SOURCES = [
    path
    for path in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()
    if not path.startswith("tests/")
]  # fmt: skip


@pytest.mark.skipif(not SOURCES, reason="not a git checkout")
def test_text_files_are_utf8_on_every_system():
    """read_text, write_text and open without an encoding take that of the system, on Windows not UTF-8."""
    bad = []
    for name in SOURCES:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node) and not any(k.arg == "encoding" for k in node.keywords):
                bad.append(f"{name}:{node.lineno}")
    assert not bad


def _is_text(call):
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    if not (isinstance(call.func, ast.Name) and call.func.id == "open"):
        return False
    mode = call.args[1] if len(call.args) > 1 else next((k.value for k in call.keywords if k.arg == "mode"), None)
    return "b" not in getattr(mode, "value", "r")


@pytest.mark.skipif(not SOURCES, reason="not a git checkout")
def test_what_windows_lacks_is_not_used_unguarded():
    """Modules and calls of Unix only stand behind a question for the system, or in an except."""
    unguarded = []
    for name in SOURCES:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import)]
        unguarded += [f"{name}: {a.name}" for node in top for a in node.names if a.name in ("resource", "fcntl", "pwd")]
        text = (ROOT / name).read_text(encoding="utf-8")
        for call in ("getloadavg", "sched_getaffinity", "sysconf"):
            if re.search(rf"os\.{call}\(", text) and not re.search(rf'hasattr\(os, "{call}"\)', text):
                unguarded.append(f"{name}: {call}")
        if "/proc/" in text and "suppress(OSError" not in text and "except" not in text:
            unguarded.append(f"{name}: /proc")
    assert not unguarded
