"""README and docs say what is there: the commands of every system, every template, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(text):
    """(module, options that change what is run) of every `python -m MODULE ...` in a text, in order."""
    found = re.findall(r"python -m ([\w.]+)([^\n#]*)", text)
    return [(module, re.findall(r"-n \w+", options)) for module, options in found]


def test_readme_has_the_same_commands_for_windows_as_make():
    """Windows has no make, so README spells out what its targets run."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = dict(re.findall(r"^([\w-]+):[^\n=]*\n((?:\t[^\n]+\n)+)", makefile, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    unix, windows = re.findall(r"```\n(.*?)```", readme[readme.index("## Two commands") :], re.DOTALL)[:2]
    named = re.findall(r"^make ([\w-]+)", unix, re.MULTILINE)
    assert named == ["demo", "test"]
    spelled = re.sub(r"\.venv\\Scripts\\python", "python", windows)
    assert commands_of(spelled) == [command for name in named for command in commands_of(targets[name])]
    assert windows.startswith("py setup_env.py\n")
    assert "$(PYTHON) setup_env.py" in targets["ready"]


def test_readme_names_every_target_that_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\btest[\w-]*", re.search(r"^\.PHONY:(.*)", makefile, re.MULTILINE)[1]):
        assert f"make {target}" in readme


def test_readme_lists_every_template():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`.*?) \|", readme, re.MULTILINE)))
    assert sorted(listed) == sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
