"""A family of base models is known in its own modules only: one in each `families/` folder, a backbone and a recipe."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {"flux", "flux2", "zimage", "sana", "dit"}
FOLDERS = ("dcgen", "train", "nodes")
# Tables of autoencoders and of schedule rules, whose published names have those of models in them, and the shipped toy.
TABLES = {"dcgen/schedule.py", "dcgen/latent.py", "dcgen/spaces.py", "dcgen/dcae/variants.py"}
TABLES |= {"nodes/bridge/latent_format.py"}


def families_in(path: Path) -> set[str]:
    """Family names in the identifiers and one-word strings of a module; prose and docstrings may name them."""
    named: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute) and root_of(node) != "comfy":
            words = [node.attr]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words = [node.name]
        elif isinstance(node, (ast.arg, ast.keyword)):
            words = [node.arg or ""]
        elif isinstance(node, ast.alias):
            words = [node.name]
        elif isinstance(node, ast.ImportFrom):
            words = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = [] if re.search(r"\s", node.value) else [node.value]
        named |= {part for word in words for part in parts_of(word)} & FAMILIES
    return named


def parts_of(word: str) -> set[str]:
    """The words in an identifier: flux_loader, FluxText and flux-base have `flux`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", word)
    return set(re.split(r"[^a-z0-9]+", spaced.lower()))


def root_of(node: ast.expr) -> str:
    """The name that a chain of attributes begins with: classes of the core may be called after a model."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def modules() -> list[str]:
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    own = [path for path in paths if "families" in path.parts or path.parts[:2] == ("train", "toy")]
    own += [
        path for path in paths if path.parts[:2] == ("dcgen", "backbones") and path.parts[2].split(".")[0] in FAMILIES
    ]
    return sorted(path.as_posix() for path in paths if path not in own and path.as_posix() not in TABLES)


@pytest.mark.parametrize("module", modules())
def test_no_other_module_names_a_family(module):
    assert not families_in(ROOT / module), "what is a family's own belongs into its module in a families/ folder"


def test_the_search_finds_names(tmp_path):
    module = tmp_path / "a.py"
    module.write_text('"""About FLUX."""\nimport x\nif x.kind == "sana":\n    y = FluxText("a FLUX model")\n')
    assert families_in(module) == {"sana", "flux"}
    module.write_text('"""FLUX."""\nimport comfy.y\nraise ValueError("load FLUX or SANA")\ncomfy.y.ModelSamplingFlux\n')
    assert families_in(module) == set()


def test_every_family_has_a_module_in_each_place():
    from dcgen.backbones import BACKBONES
    from train.families import FAMILIES as trained

    assert set(BACKBONES) == set(trained) == FAMILIES
    in_comfyui = {path.stem for path in (ROOT / "nodes" / "bridge" / "families").iterdir()} & FAMILIES
    assert in_comfyui == {"flux", "flux2", "zimage", "sana"}
