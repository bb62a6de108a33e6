"""What the Registry's archive holds: all that the nodes and the training need, and not the tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "setup_env.py")
NEEDED += ("nodes", "dcgen", "train", "toy", "web", "locales", "workflows", "subgraphs")
MOST_BYTES = 30_000_000


def listed(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git repository here")
    return [name for name in done.stdout.decode().split("\0") if name]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The tracked files that .comfyignore, which is read like .gitignore, leaves in."""
    left_out = set(listed("--cached", "--ignored", "--exclude-from=.comfyignore"))
    folder = tmp_path_factory.mktemp("archive")
    for name in listed("--cached"):
        if name not in left_out and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_what_is_in_it(archive):
    assert [name for name in NEEDED if not (archive / name).exists()] == []
    assert [name for name in ("tests", "benchmarks", ".ci", "docs/toy_grid.png") if (archive / name).exists()] == []
    assert sum(path.stat().st_size for path in archive.rglob("*") if path.is_file()) < MOST_BYTES


def test_training_runs_from_it(archive):
    """Every module of dcgen and train imports, and the recipes are listed."""
    done = subprocess.run(
        [sys.executable, "-m", "train.run", "--list"], cwd=archive, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "flux-4k" in done.stdout
    files = [path for part in ("dcgen", "train") for path in (archive / part).rglob("*.py")]
    names = [path.relative_to(archive).with_suffix("") for path in files]
    code = "import importlib\n" + "".join(
        f"importlib.import_module({'.'.join(name.parts).removesuffix('.__init__')!r})\n" for name in names
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=archive, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
