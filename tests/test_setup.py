"""The set-up script: what it installs, when it has nothing to do, and that the lock covers every requirement."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = [("linux", "Linux", "posix"), ("darwin", "Darwin", "posix"), ("win32", "Windows", "nt")]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup_env

    return setup_env


@pytest.fixture
def copy(setup, tmp_path, monkeypatch):
    """The script on a copy of the files it reads; .commands is what it ran, and no command does anything."""
    for name in (*setup.FILES, setup.LOCK, "setup_env.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    commands = []

    def run(command, what):
        commands.append(command)
        if "venv" in command:
            python = setup.interpreter(Path(command[-1]))
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.delenv("TORCH", raising=False)
    setup.commands = commands
    return setup


def requirements():
    names = ("requirements.txt", "train/requirements.txt", "requirements-dev.txt")
    lines = [line.split("#")[0] for name in names for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line.strip()]


def test_torch_comes_first_and_alone_then_the_rest_with_the_lock(copy):
    assert copy.main([]) == 0
    venv, torch, rest = copy.commands
    assert venv[1:3] == ["-m", "venv"]
    assert torch[-1] == copy.TORCH
    assert [part for part in torch if part.endswith(".txt")] == []
    assert rest[rest.index("-c") + 1] == str(copy.ROOT / "constraints.txt")
    assert [part for part in rest if part.endswith(".txt")][1:] == [str(copy.ROOT / name) for name in copy.FILES]


def test_a_second_time_nothing_is_done(copy):
    assert copy.main([]) == 0
    copy.commands.clear()
    assert copy.main([]) == 0
    assert copy.commands == []


@pytest.mark.parametrize("name", ["requirements-dev.txt", "train/requirements.txt", "constraints.txt", "setup_env.py"])
def test_a_changed_file_installs_anew(copy, name):
    copy.main([])
    copy.commands.clear()
    with open(copy.ROOT / name, "a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert copy.main([]) == 0
    assert len(copy.commands) == 3


def test_the_users_torch_stays_until_another_is_named(copy, monkeypatch):
    monkeypatch.setenv("TORCH", "torch --index-url https://torch.invalid/cu130")
    copy.main([])
    assert copy.commands[1][-3:] == ["torch", "--index-url", "https://torch.invalid/cu130"]
    monkeypatch.delenv("TORCH")
    copy.commands.clear()
    assert copy.main([]) == 0
    assert copy.commands == []
    assert copy.main(["--torch", "torch==2.14.0"]) == 0
    assert copy.commands[1][-1] == "torch==2.14.0"


def test_what_was_not_finished_is_not_ready(copy, monkeypatch, capsys):
    complete = copy.run

    def fail(command, what):
        if "-r" in command:
            raise copy.SetupError("no network")
        complete(command, what)

    monkeypatch.setattr(copy, "run", fail)
    assert copy.main([]) == 1
    assert "no network" in capsys.readouterr().err
    monkeypatch.setattr(copy, "run", complete)
    copy.commands.clear()
    assert copy.main([]) == 0
    assert len(copy.commands) == 3


def test_a_stamp_that_cannot_be_read_is_none(copy):
    (copy.ROOT / ".venv").mkdir()
    (copy.ROOT / ".venv" / ".ready").touch()
    assert copy.main([]) == 0
    assert len(copy.commands) == 3


def test_newest_is_made_anew_without_bounds_and_oldest_with_lower_bounds(copy, monkeypatch):
    for _ in range(2):
        copy.commands.clear()
        assert copy.main(["--newest"]) == 0
        assert "--clear" in copy.commands[0]
        assert "-c" not in copy.commands[2]
    seen = []
    complete = copy.run

    def look(command, what):
        if "-c" in command:
            seen.extend(Path(command[command.index("-c") + 1]).read_text(encoding="utf-8").splitlines())
        complete(command, what)

    monkeypatch.setattr(copy, "run", look)
    monkeypatch.setattr(copy, "PYTHON_OF_OLDEST", sys.version_info[:2])
    assert copy.main(["--oldest"]) == 0
    pinned = dict(line.split("==") for line in seen)
    for requirement in requirements():
        if requirement.name in pinned:
            assert str(requirement.specifier) == f">={pinned[requirement.name]}"
    assert {"transformers", "diffusers", "numpy", "safetensors"} <= pinned.keys()
    assert not {"torch", "pytest", "ruff"} & pinned.keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "system", "name"), SYSTEMS, ids=[row[1] for row in SYSTEMS])
def test_the_lock_names_one_version_of_every_requirement(python, platform, system, name):
    where = {"sys_platform": platform, "platform_system": system, "os_name": name, "platform_machine": "x86_64"}
    where |= {"python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython"}
    where |= {"platform_python_implementation": "CPython"}
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        entry = Requirement(line)
        assert re.fullmatch(r"==[\w.]+", str(entry.specifier)), line
        if entry.marker is None or entry.marker.evaluate(where):
            key = entry.name.lower()
            assert key not in pinned, f"{key} has two versions there"
            pinned[key] = Version(str(entry.specifier)[2:])
    assert not [key for key in pinned if key in ("torch", "triton", "setuptools") or key.startswith("nvidia")]
    for requirement in requirements():
        if requirement.name != "torch":
            version = pinned[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version), requirement


def test_a_failed_command_says_what_it_was_for_and_what_helps(setup, capfd):
    say = "import sys; sys.stderr.write('NewConnectionError: getaddrinfo failed'); sys.exit(3)"
    with pytest.raises(setup.SetupError, match=r"could not install x \(exit status 3.*HTTPS_PROXY"):
        setup.run([sys.executable, "-c", say], "install x")
    assert "getaddrinfo" in capfd.readouterr().err
    with pytest.raises(setup.SetupError, match="disk is full"):
        setup.run([sys.executable, "-c", say.replace("NewConnectionError: getaddrinfo failed", "[Errno 28]")], "x")


def test_an_old_python_is_told_so(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "OLDEST_PYTHON", (99, 0))
    assert setup.main([]) == 1
    assert "or newer is needed. Name a newer one" in capsys.readouterr().err


def test_a_python_newer_than_the_oldest_releases_is_told_so(copy, monkeypatch, capsys):
    monkeypatch.setattr(copy, "PYTHON_OF_OLDEST", (3, 0))
    assert copy.main(["--oldest"]) == 1
    assert "make PYTHON=python3.11 test-oldest" in capsys.readouterr().err
    assert copy.commands == []


def test_a_python_without_venv_is_told_so(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert setup.main([]) == 1
    assert "-venv" in capsys.readouterr().err


def test_help_says_what_there_is():
    done = subprocess.run([sys.executable, ROOT / "setup_env.py", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("--newest", "--oldest", "--lock", "--torch"))
