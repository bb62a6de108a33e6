"""Whose classes and files make the conditioning: those that are known, never those that a release brings."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from train.families import FAMILIES
from train.text_parts import check_text, text_identity

FLUX = FAMILIES["flux"]
TOY_SANA = Path(__file__).parents[2] / "toy" / "sana-base"


@pytest.fixture
def release(debug_run, tmp_path):
    """A copy of the debug run's base."""
    return shutil.copytree(debug_run / "tiny" / "release", tmp_path / "release")


def rename(release, part, named):
    index = release / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: named}))


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
@pytest.mark.parametrize(
    "named",
    [["transformers", name] for name in ("pipeline", "utils", "__class__", "AutoTokenizer", "AutoModel", None, 5, [1])]
    + ["CLIPTokenizer", 5, [], ["transformers"], {"a": 1}],
)
def test_only_known_classes_are_loaded(release, part, named):
    rename(release, part, named)
    with pytest.raises(ValueError, match=r"model_index\.json.*" + part):
        FLUX.text_encoder(release, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"model_index\.json.*" + part):
        check_text(release, FLUX.text_parts)


def test_the_known_classes_run_no_code_of_a_folder():
    import transformers

    for name in {name for f in FAMILIES.values() for names in f.text_parts.values() for name in names}:
        assert not name.startswith("Auto")
        assert name == "TokenizersBackend" or isinstance(getattr(transformers, name), type)


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(release, tmp_path, monkeypatch):
    """With a class that is known, over files that ask for code of their own."""
    mark = tmp_path / "ran"
    for part in ("tokenizer", "text_encoder"):
        (release / part / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    for part, file, auto in (
        ("tokenizer", "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        ("text_encoder", "config.json", {"AutoModel": "own.Own", "AutoConfig": "own.Own"}),
    ):
        path = release / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))

    def asked(*_):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys.stdin, "readline", asked, raising=False)
    assert FLUX.text_encoder(release, "cpu", torch.float32)(["a red square"])
    assert not mark.exists()


def test_weights_that_are_pickles_are_not_loaded(release):
    """A pickle may run code when it is read."""
    folder = release / "text_encoder"
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        FLUX.text_encoder(release, "cpu", torch.float32)


def test_files_of_a_mac_are_not_part_of_the_identity(release):
    before = text_identity(release, FLUX.text_parts)
    (release / "text_encoder" / "._model.safetensors").write_bytes(b"Mac OS X")
    assert text_identity(release, FLUX.text_parts) == before


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_sana_encodes_captions_of_a_batch_in_one_pass_as_one_by_one(dtype, rounding, monkeypatch):
    """A toy Gemma of 4 layers; captions of several lengths, longer than the text too, and empty ones among them."""
    sana = FAMILIES["sana"]
    encode = sana.text_encoder(TOY_SANA, "cpu", dtype, tokens=24)
    captions = ["", "dog face on a white background", "robot", "", "a rocket " * 40, "bus on a red background"]
    passes = []
    forward = encode.pipeline.text_encoder.forward

    def counted(ids, **names):
        passes.append(len(ids))
        return forward(ids, **names)

    monkeypatch.setattr(encode.pipeline.text_encoder, "forward", counted)
    one_by_one = [encode([caption]) for caption in captions]
    assert passes == [1] * 6
    passes.clear()
    found = encode(captions)
    assert sorted(passes) == [2, 4]
    expected = torch.cat([row["prompt_embeds"] for row in one_by_one])
    assert torch.equal(found["mask"], torch.cat([row["mask"] for row in one_by_one]))
    assert found["mask"].sum(1).int().tolist()[0] < 3
    error = (found["prompt_embeds"] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < rounding, error
    assert (expected[1] - expected[5]).norm() > 0.1 * expected[1].norm()  # captions differ, so a wrong order would show
    assert torch.equal(encode(["", ""])["prompt_embeds"][0], encode(["", ""])["prompt_embeds"][1])
