"""Make the environment of the tests and the training: `python setup_env.py` (Windows: `py setup_env.py`).

It lies in .venv and gets torch first and alone, for what depends on torch must find it there or pip picks a build of
its own; then everything else, at the versions in constraints.txt. Run again, it does nothing until a file that it
read has changed. Standard library only; the nodes in ComfyUI need none of this.
"""

# No annotations of a newer Python here: an old one must get as far as being told that it is too old.
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)
PYTHON_OF_OLDEST = (3, 11)  # the last that the lower bounds have wheels for (numpy 1.25)
TORCH = "torch==2.13.0"  # what this project's figures were made with
FILES = ("requirements.txt", "train/requirements.txt", "requirements-dev.txt")
RUNTIME = FILES[:2]  # --oldest bounds these; the tools of the tests stay new
LOCK = "constraints.txt"
# The user's choice of torch brings these along; a pin of ours could contradict it.
TORCHS = re.compile(r"torch|setuptools|triton|nvidia-.+|cuda-.+")
STAMP = ".ready"
NETWORK = re.compile(
    r"NewConnectionError|Max retries|Connection (refused|reset|aborted)|timed out|name resolution|getaddrinfo|"
    r"ProxyError|Network is unreachable|SSLError|CERTIFICATE_VERIFY_FAILED|from versions: none"
)
HEADER = """\
# The versions that `make`, or `python setup_env.py`, installs: for Linux, macOS and Windows, Python 3.10 and newer.
# torch and what comes with it are not among them. Written by `python setup_env.py --lock`; do not edit.
"""


class SetupError(Exception):
    """What went wrong, and what to do about it."""


def main(arguments: list) -> int:
    """Make or renew one environment, or the lock; 0 when it is there."""
    options = _parser().parse_args(arguments)
    try:
        check_python()
        if options.lock:
            write_lock()
        else:
            make(options.kind, options.torch or os.environ.get("TORCH"))
    except SetupError as error:
        print(f"setup_env.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup_env.py: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    """Refuse a Python that is too old, or that cannot make environments."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"this is Python {sys.version.split()[0]} ({sys.executable}); 3.10 or newer is needed. "
            "Name a newer one: `make PYTHON=python3.12 test`, or `python3.12 setup_env.py` (Windows: "
            "`py -3.12 setup_env.py`)."
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SetupError(
            f"this Python ({sys.executable}) cannot make environments: its module venv or ensurepip is missing. "
            f"On Debian and Ubuntu: apt install python3.{sys.version_info[1]}-venv. Elsewhere take a Python from "
            "python.org."
        )


def make(kind: str, torch: str) -> None:
    """Make .venv (kind "") or .venv-KIND, unless it is there and up to date."""
    if kind == "oldest" and sys.version_info[:2] > PYTHON_OF_OLDEST:
        raise SetupError(
            f"this is Python {sys.version.split()[0]}, newer than the oldest releases know. Name Python 3.10 or 3.11: "
            "`make PYTHON=python3.11 test-oldest`."
        )
    folder = ROOT / (f".venv-{kind}" if kind else ".venv")
    stamp = folder / STAMP
    done = read_stamp(stamp)
    wanted = {"torch": torch or done.get("torch", TORCH), "python": sys.version.split()[0], "files": digest(kind)}
    python = interpreter(folder)
    if kind != "newest" and done == wanted and python.is_file():
        return
    print(f"setting up {folder} (torch, then the rest: some minutes, once)", flush=True)
    if stamp.is_file():
        stamp.unlink()
    fresh = kind == "newest" or not python.is_file() or done.get("python", wanted["python"]) != wanted["python"]
    run([sys.executable, "-m", "venv", *(["--clear"] if fresh else []), str(folder)], f"make {folder}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *shlex.split(wanted["torch"])], f"install {wanted['torch']}")
    with tempfile.TemporaryDirectory() as scratch:
        bounds = constraints(kind, Path(scratch))
        lists = [part for name in FILES for part in ("-r", str(ROOT / name))]
        run([*pip, *(["-c", str(bounds)] if bounds else []), *lists], "install " + ", ".join(FILES))
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    print(f"{folder} is ready", flush=True)


def read_stamp(path: Path) -> dict:
    """What an environment was made from; nothing where it is unfinished, or of an earlier way to make it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(kind: str) -> str:
    """Changes with whatever decides what is installed, this file included."""
    names = [*FILES, Path(__file__).name, *([] if kind else [LOCK])]
    content = b"\0".join((ROOT / name).read_bytes().replace(b"\r\n", b"\n") for name in names)
    return hashlib.sha256(content).hexdigest()


def constraints(kind: str, scratch: Path) -> Path:
    """The file of versions to take; None for the newest."""
    if kind == "newest":
        return None
    if not kind:
        return ROOT / LOCK
    path = scratch / "oldest.txt"
    path.write_text("\n".join(lower_bounds()) + "\n", encoding="utf-8")
    return path


def lower_bounds() -> list:
    """`name==version` of every requirement's lower bound, torch left out."""
    bounds = {}
    for name in RUNTIME:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            line = line.split("#")[0].strip()
            found = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)$", line)
            if line and not found:
                raise SetupError(f"{ROOT / name}: {line!r} has no lower bound alone; write it as name>=version")
            if found and not TORCHS.fullmatch(found.group(1).lower()):
                bounds[found.group(1)] = found.group(2)
    return [f"{name}=={version}" for name, version in bounds.items()]


def write_lock() -> None:
    """Write constraints.txt: the newest releases that fit together, by uv, for every system and Python."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run([sys.executable, "-m", "venv", str(place / "uv")], "make an environment for uv")
        python = str(interpreter(place / "uv"))
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], "install uv")
        # torch, and what only torch needs, is resolved for a system that does not exist, and left out below.
        (place / "torch.txt").write_text('torch ; sys_platform == "never"\n', encoding="utf-8")
        how = ["--universal", "--python-version", "3.10", "--override", str(place / "torch.txt"), "--upgrade"]
        how += ["--no-annotate", "--no-header", "--quiet", "--output-file", str(place / "lock.txt")]
        run([python, "-m", "uv", "pip", "compile", *how, *(str(ROOT / name) for name in FILES)], "resolve")
        lines = (place / "lock.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "'never'" not in line and not TORCHS.fullmatch(re.split("[ =]", line)[0])]
    (ROOT / LOCK).write_text(HEADER + "\n".join(kept) + "\n", encoding="utf-8")
    print(f"{ROOT / LOCK}: {len(kept)} lines")


def run(command: list, what: str) -> None:
    """Run a command; where it fails, say what it was to do and what helps."""
    print("  " + what, flush=True)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    said = []
    for line in process.stderr:
        said.append(line)
        sys.stderr.write(line)
    if process.wait():
        raise SetupError(f"could not {what} (exit status {process.returncode}, see above). {advice(''.join(said))}")


def advice(said: str) -> str:
    """What to do, judged by what the command said."""
    if NETWORK.search(said):
        return (
            "The package index was not reached, or has nothing for this system: check the network; behind a proxy set "
            "HTTPS_PROXY, for an index of your own PIP_INDEX_URL. Then run this again; what was installed stays."
        )
    if "No space left" in said or "Errno 28" in said:
        return "The disk is full: torch alone takes 1 GB, and up to 6 GB with CUDA."
    return (
        "If a version was not found for this Python, take another (`make PYTHON=python3.12 test`, Windows "
        "`py -3.12 setup_env.py`), or another torch (`TORCH=torch`). Then run this again."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--newest", dest="kind", action="store_const", const="newest", help=".venv-newest, made anew: no constraints"
    )
    kinds.add_argument(
        "--oldest", dest="kind", action="store_const", const="oldest", help=".venv-oldest: the lower bounds"
    )
    kinds.add_argument("--lock", action="store_true", help=f"write {LOCK} anew, from the newest releases; then test")
    parser.add_argument("--torch", help=f"what pip installs first (default: TORCH of the environment, else {TORCH})")
    parser.set_defaults(kind="")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
