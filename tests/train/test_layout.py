"""How train/ is laid out: no import circle, and a family's name only in its own file, the toy and the recipes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dcgen.backbones import BACKBONES
from train.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "train").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports anywhere, functions and type checking included."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= inner if inner <= modules else {*(inner & modules), node.module or ""}
    return named & modules


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path) for path in FILES}
    left = {module_name(path): imports(path, modules) for path in FILES}
    assert len(left) > 40
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    assert not {name: sorted(needed & left.keys()) for name, needed in left.items()}


def test_no_family_is_named_outside_of_its_own_file():
    """A schedule's rule may have a family's name: it is a formula, and other families use it."""
    assert set(FAMILIES) == set(BACKBONES)
    named = re.compile(rf"(?i)\b({'|'.join(FAMILIES)})\b")
    rule = re.compile(r"\brule\b|\bSchedule\(")
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if path.relative_to(ROOT).parts[1] not in ("families", "toy")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if named.search(line) and not rule.search(line)
    ]
    assert not bad, "\n".join(bad)
