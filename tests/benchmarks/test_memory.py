"""The memory table: against counts that were published or are simple arithmetic, and the templates that quote it."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import CARDS, GIB, needs, note, table

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ["dcgen_flux_4k", "dcgen_flux_4k_img2img", "dcgen_flux_4k_adapter", "dcgen_flux_4k_4bit"]
TEMPLATES += ["dcgen_flux_1k_to_4k_refine"]


def row(model, format):
    return next(row for row in needs() if (row.model, row.format) == (model, format))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("DC-Gen FLUX 4K", 11.9e9),
        ("DC-Gen klein 4B 4K", 3.88e9),
        ("DC-Gen Z-Image 1K", 6.15e9),
        ("SANA 1.6B 1K", 1.6e9),
        ("SANA 4.8B 1K", 4.72e9),
    ],  # as their model cards say
)
def test_weights_are_those_of_the_published_counts(model, parameters):
    assert row(model, "bf16").weights * GIB / 2 == pytest.approx(parameters, rel=0.02)
    assert row(model, "fp8, int8").weights == pytest.approx(row(model, "bf16").weights / 2, rel=0.02)
    assert row(model, "nvfp4").weights == pytest.approx(row(model, "bf16").weights * 0.5625 / 2, rel=0.02)


def test_what_stays_in_ram_is_what_the_card_lacks():
    need = row("DC-Gen FLUX 4K", "bf16")
    assert need.on_card(12) == pytest.approx(need.weights + need.step + 1 - 12)
    assert need.on_card(200) == 0
    assert need.on_card(12) - need.on_card(16) == pytest.approx(4)
    assert len(table(needs()).splitlines()) == 2 + len(needs())
    assert all(f"{size} GB card" in table(needs()) for size in CARDS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_quote_it(name):
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert note("DC-Gen FLUX 4K") in notes[0]


def test_readme_quotes_it():
    lines = table([need for need in needs() if need.format != "nvfp4" or "FLUX" in need.model]).splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in lines if line not in readme] == []
