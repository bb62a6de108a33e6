"""The walk of a user's first hour: what beginners do wrong on the command line, and the pages that it writes."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks.walk import commands, templates
from benchmarks.walk.__main__ import record
from benchmarks.walk.mistakes import COMMAND, COMMANDS, GRAPHS, Outcome, command_outcome, judged, page, refusal


@pytest.mark.parametrize("mistake", COMMANDS, ids=lambda mistake: mistake.title)
def test_command(tmp_path, mistake):
    mistake.files(tmp_path)
    outcome = command_outcome(tmp_path, mistake)
    assert not outcome.missing, outcome.message
    assert str(tmp_path) not in outcome.message


def test_a_message_that_says_too_little_is_found(tmp_path):
    assert judged(GRAPHS[1], "at Run", "some error", tmp_path).missing == list(GRAPHS[1].must)


def test_the_page_has_every_mistake():
    committed = (templates.PACK / "docs" / "mistakes.md").read_text(encoding="utf-8")
    for mistake in (*GRAPHS, *COMMANDS):
        assert f"| {mistake.title} |" in committed
    made = page([Outcome("a", "at Run", "x | y <b>"), Outcome("c", COMMAND, "z" * 1000)])
    assert "| a | at Run | x \\| y \\<b\\> |" in made
    assert made.index("| a |") < made.index("On the command line") < made.index("| c |")
    assert "zzz …" in made


def test_a_refusal_is_told_by_node():
    errors = [{"message": "Value not in list", "details": "release: 'a' not in ['b']"}]
    answer = {"error": {}, "node_errors": {"1": {"class_type": "Loader", "errors": errors}}}
    assert refusal(f"refused: {json.dumps(answer)}") == "Loader: Value not in list: release: 'a' not in ['b']"


def test_the_contact_sheet_has_a_row_for_each_template_and_a_column_for_each_page(tmp_path):
    views = []
    for row, name in enumerate(("one", "two")):
        for column, mode in enumerate(templates.MODES):
            file = f"{name}-{column}.png"
            Image.new("RGB", (160, 100), (100 * row, 100 * column, 200)).save(tmp_path / file)
            views.append(templates.View(name, "1.0", mode, file, 1.0, False, [], ["an error"] * row))
    templates.contact_sheet(views, tmp_path, tmp_path / "sheet.webp")
    sheet = Image.open(tmp_path / "sheet.webp").convert("RGB")
    width, height = templates.THUMBNAIL
    assert sheet.size == (2 * width, 2 * (height + templates.LABEL))
    for row in (0, 1):
        for column in (0, 1):
            seen = sheet.getpixel((width * column + 200, (height + templates.LABEL) * row + 150))
            assert max(abs(a - b) for a, b in zip(seen, (100 * row, 100 * column, 200), strict=True)) < 12
    assert "| 1.0 | Nodes 2.0 | 2 | 0 | 0 | 1 |" in templates.table(views)


def test_parts_are_recorded_beside_each_other(tmp_path):
    record(tmp_path, "setup", commands.as_json([commands.Command("make ready", 1.0, 0, "ready")]))
    record(tmp_path, "templates", [])
    record(tmp_path, "setup", [])
    found = json.loads((tmp_path / "walk.json").read_text(encoding="utf-8"))
    assert (found["setup"], found["templates"]) == ([], [])
