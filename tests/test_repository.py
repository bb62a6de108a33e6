"""Rules of the repository: import directions, what is shipped, the size of nodes."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "dcgen": {
        "comfy",
        "comfy_api",
        "comfy_extras",
        "folder_paths",
        "diffusers",
        "transformers",
        "peft",
        "train",
        "nodes",
    },
    "train": {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"},
}
# Outside nodes/bridge a node may use ComfyUI's public node API and its folder lists, not comfy's internals.
NODE_FORBIDDEN = {"comfy", "latent_preview", "nodes", "diffusers", "train"}
TOY_BUDGET_BYTES = 25 * 1024 * 1024


def tracked(*patterns: str) -> list[Path]:
    """Tracked and new files, without ignored ones, so that rules are checked before a commit; all files without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        paths = [p for pattern in patterns for p in ROOT.rglob(pattern) if ".venv" not in p.parts]
        return [p for p in paths if p.is_file()]
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_import_direction(package):
    files = [p for p in tracked("*.py") if p.relative_to(ROOT).parts[0] == package]
    assert files, f"no files found in {package}/"
    bad = {str(p.relative_to(ROOT)): hit for p in files if (hit := imported_roots(p) & FORBIDDEN[package])}
    assert not bad


def test_comfy_internals_only_in_bridge():
    files = [p for p in tracked("*.py") if p.relative_to(ROOT).parts[0] == "nodes" and "bridge" not in p.parts]
    assert files
    bad = {str(p.relative_to(ROOT)): hit for p in files if (hit := imported_roots(p) & NODE_FORBIDDEN)}
    assert not bad


def test_pack_imports_its_own_packages_relatively():
    """ComfyUI loads the folder under a name derived from its path, so `import dcgen` would not find our package."""
    files = [p for p in tracked("*.py") if p.relative_to(ROOT).parts[0] in {"nodes", "dcgen"}]
    files.append(ROOT / "__init__.py")
    bad = [str(p.relative_to(ROOT)) for p in files if imported_roots(p) & {"dcgen"}]
    assert not bad


# Imports (of the first module, of the second) without which there would be no circle. A line goes with its circle; none
# is added.
CIRCLES: set[tuple[str, str]] = set()


def imported_modules(module: str, path: Path, modules: Collection[str]) -> set[str]:
    """The modules among `modules` that the file imports, wherever in it the import stands.

    An import in a function or under TYPE_CHECKING counts too: it hides a circle but does not break it. Importing `a.b`
    runs `a` first, so it is an import of `a` as well, except for modules inside `a`.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    needed: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            submodules = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            needed |= submodules if submodules <= set(modules) else submodules | {source}
    parents = {".".join(name.split(".")[:depth]) for name in needed for depth in range(1, name.count(".") + 1)}
    enclosing = {".".join(package[:depth]) for depth in range(1, len(package) + 1)}
    return (needed | (parents - enclosing)) & set(modules) - {module}


def import_circle(graph: dict[str, set[str]], allowed: Collection[tuple[str, str]] = ()) -> list[str]:
    """The modules of one circle of imports, in order; [] when there is none. Allowed imports do not count."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        others = sorted(other for other in graph[name] if (name, other) not in allowed)
        return next((found for other in others if (found := visit(other, [*path, name]))), [])

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    files = {
        ".".join(parts).removesuffix(".__init__"): path
        for path in tracked("*.py")
        if (parts := path.relative_to(ROOT).with_suffix("").parts)[0] in {"dcgen", "train", "nodes"}
    }
    graph = {name: imported_modules(name, path, files) for name, path in files.items()}
    assert not import_circle(graph, CIRCLES)
    assert [pair for pair in sorted(CIRCLES) if not import_circle(graph, CIRCLES - {pair})] == [], "no circle any more"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from . import second", "from .first import x"),
        ("import pack.second", "def f():\n    from pack.first import x"),
        ("from .second import x", "if TYPE_CHECKING:\n    import pack.first"),
        ("from .inner.deep import x", ""),  # which runs inner/__init__.py, and that imports first
    ],
)
def test_circles_of_imports_are_found(tmp_path, first, second):
    sources = {"__init__": "", "first": first, "second": second, "inner/__init__": "from ..first import x"}
    sources["inner/deep"] = ""
    files = {}
    for name, text in sources.items():
        path = tmp_path / f"pack/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        files[f"pack/{name}".replace("/", ".").removesuffix(".__init__")] = path
    assert "pack.first" in import_circle({name: imported_modules(name, path, files) for name, path in files.items()})
    files["pack.first"].write_text("import os")
    assert not import_circle({name: imported_modules(name, path, files) for name, path in files.items()})


BLOCKER = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked in this test", name=name)
sys.meta_path.insert(0, Block())
"""


def modules_of(package: str) -> list[str]:
    files = [p.relative_to(ROOT) for p in tracked("*.py") if p.relative_to(ROOT).parts[0] == package]
    names = [".".join(p.with_suffix("").parts) for p in files]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_every_module_imports_without_what_it_must_not_need(package):
    blocked = FORBIDDEN[package] - {"train"} if package == "train" else FORBIDDEN[package]
    code = f"BLOCKED = {sorted(blocked)!r}\n{BLOCKER}\nimport importlib\n"
    code += "\n".join(f"importlib.import_module({name!r})" for name in modules_of(package))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_root_imports_without_comfyui(tmp_path):
    """A tool that merely looks at the pack (a packager, pytest) must not trip over it."""
    code = f"BLOCKED = ['comfy', 'comfy_api', 'folder_paths']\n{BLOCKER}\n"
    code += "import importlib.util\n"
    code += f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, "
    code += f"submodule_search_locations=[{str(ROOT)!r}])\n"
    code += "m = importlib.util.module_from_spec(spec); sys.modules['pack'] = m; spec.loader.exec_module(m)\n"
    code += "assert callable(m.comfy_entrypoint) and m.WEB_DIRECTORY\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def execute_methods():
    for path in tracked("*.py"):
        if path.relative_to(ROOT).parts[0] != "nodes":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                yield path.relative_to(ROOT), node


def test_execute_stays_thin():
    lengths = {f"{path}:{node.lineno}": node.end_lineno - node.lineno + 1 for path, node in execute_methods()}
    assert lengths
    assert not {where: lines for where, lines in lengths.items() if lines > 25}


def test_toy_fits_its_budget():
    size = sum(p.stat().st_size for p in tracked("toy/*"))
    assert 0 < size < TOY_BUDGET_BYTES, f"toy/ holds {size / 2**20:.1f} MiB"


def test_no_machine_paths_in_files():
    pattern = re.compile(r"/(root|work|farm)/")
    text_files = [p for p in tracked() if p.suffix not in {".safetensors", ".png", ".jpg", ".webp"}]
    bad = [
        str(p.relative_to(ROOT))
        for p in text_files
        if p != Path(__file__).resolve() and pattern.search(p.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not bad


def test_users_install_neither_torch_nor_diffusers():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[<>=!~ ]", line)[0].lower() for line in lines if line and not line.startswith("#")]
    assert not {"torch", "diffusers", "nunchaku", "torchvision"} & set(names)
    assert not [line for line in lines if "==" in line or "<" in line.split("#")[0]], "lower bounds only"


@pytest.mark.skipif(os.name == "nt", reason="the executable bit means nothing on Windows")
def test_ci_runs_the_readme_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in script
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
