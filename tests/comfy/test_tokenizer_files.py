"""Tokenizer folders that the installed transformers' classes cannot read: tokenizer.json says the same."""

import json
import shutil
from pathlib import Path

import pytest

TOY = Path(__file__).resolve().parents[2] / "toy"
TEXTS = ["dog face on a red background", "", "Zebra 7! \N{ROBOT FACE}"]
FOLDERS = {
    "clip": ("flux-base/tokenizer", ["transformers", "CLIPTokenizer"]),
    "t5": ("flux-base/tokenizer_2", ["transformers", "T5TokenizerFast"]),
    "gemma": ("sana-base/tokenizer", ["transformers", "PreTrainedTokenizerFast"]),
}


@pytest.fixture(scope="module")
def found(comfy, tmp_path_factory):
    """What came of the shipped folders, of copies that no class reads, and of folders with less in them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    folders = {}
    for name, (path, entry) in FOLDERS.items():
        folders[name] = (str(TOY / path), entry)
        folders[f"{name} foreign"] = (str(foreign(TOY / path, folder / name)), entry)
    broken = foreign(TOY / "flux-base/tokenizer_2", folder / "broken")
    (broken / "tokenizer.json").write_text('{"version": "9.0", "model": {"type": "Unheard"}}')
    folders["broken"] = (str(broken), FOLDERS["t5"][1])
    (folder / "empty").mkdir()
    folders["empty"] = (str(folder / "empty"), FOLDERS["t5"][1])
    work = tmp_path_factory.mktemp("tokenizers-run")
    return comfy.run("tokenizer_files:load", work, {}, {"folders": folders, "texts": TEXTS}, ("--cpu",))[1]


def foreign(source, target):
    """A copy whose config has a field in a form that this transformers does not know, as between 4 and 5."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "added_tokens_decoder": {"zero": 5}}), encoding="utf-8")
    return target


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_no_class_reads_is_read_from_tokenizer_json(found, name):
    assert "error" not in found[name]
    assert found[f"{name} foreign"] == found[name]


def test_a_tokenizer_of_a_newer_release_is_said_to_be_one(found):
    error = found["broken"]["error"]
    assert "A newer release may have written it: update transformers" in error
    assert "Download" not in error
    assert "protobuf" not in error


def test_a_folder_without_a_tokenizer_is_said_to_be_one(found):
    assert (
        "has no tokenizer: found nothing, expected tokenizer.json. Download the release again"
        in (found["empty"]["error"])
    )
