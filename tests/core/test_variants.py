"""Folders that hold several precisions of the same weights, named as diffusers and transformers name them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dcgen.tensors import Tensors


def single(folder, name, value):
    save_file({"a": torch.full((2,), float(value)), "b": torch.full((2,), float(value))}, folder / name)


def sharded(folder, variant, value):
    dot = f".{variant}" if variant else ""
    names = {}
    for i, key in enumerate("ab", 1):
        file = f"model{dot}-{i:05}-of-00002.safetensors"
        save_file({key: torch.full((2,), float(value))}, folder / file)
        names[key] = file
    (folder / f"model.safetensors.index{dot}.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"": 1}, 1),
        ({"": 1, "bf16": 2}, 1),
        ({"bf16": 2, "fp16": 3}, 2),
        ({"fp16": 3}, 3),
        ({"fp32": 4}, 4),
    ],
)
@pytest.mark.parametrize("write", [single, sharded])
def test_one_set_is_read(tmp_path, files, wanted, write):
    for variant, value in files.items():
        if write is single:
            single(tmp_path, f"model{'.' if variant else ''}{variant}.safetensors", value)
        else:
            sharded(tmp_path, variant, value)
    opened = Tensors.open(tmp_path)
    assert sorted(opened.entries) == ["a", "b"]
    assert all(float(opened.get(key)[0]) == wanted for key in "ab")


def test_single_plain_beside_sharded_variant(tmp_path):
    single(tmp_path, "model.safetensors", 1)
    sharded(tmp_path, "bf16", 2)
    assert float(Tensors.open(tmp_path).get("a")[0]) == 1


def test_two_models_in_a_folder_are_refused(tmp_path):
    single(tmp_path, "one.safetensors", 1)
    single(tmp_path, "two.safetensors", 2)
    with pytest.raises(ValueError, match=r"expected one .safetensors file"):
        Tensors.open(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path):
    sharded(tmp_path, "", 1)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"expected one .safetensors file"):
        Tensors.open(tmp_path)
