"""The streaming writer against safetensors' own reader, and what it leaves behind when it fails: nothing."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dcgen import files
from dcgen.files import DTYPES, Entry, entries, meta_tensors, opened, write_stream


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6
    ),
    order=st.randoms(use_true_random=False),
    metadata=st.dictionaries(st.text(min_size=1, max_size=4), st.text(max_size=8), max_size=2),
)
def test_any_tensors_in_any_order(tmp_path, kinds, order, metadata):
    tensors = {}
    for i, (kind, shape) in enumerate(kinds):
        dtype = DTYPES[kind]
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        tensors[f"t{i}"] = raw.view(dtype).reshape(shape)
    wanted = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    items = list(tensors.items())
    order.shuffle(items)
    path = tmp_path / "a.safetensors"
    write_stream(path, wanted, iter(items), metadata)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
        assert sorted(entries(file), key=lambda e: e.name) == sorted(wanted, key=lambda e: e.name)
        assert {key: value.shape for key, value in meta_tensors(entries(file)).items()} == {
            key: value.shape for key, value in tensors.items()
        }
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_transposed_tensors_are_written_in_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    write_stream(tmp_path / "a.safetensors", [Entry("t", tensor.dtype, (4, 3))], [("t", tensor)])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], tensor)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(2))], "1 announced tensors never came, first b"),
        ([("a", torch.zeros(2)), ("c", torch.zeros(2))], "c was not announced"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "came twice"),
        ([("a", torch.zeros(3))], "a is torch.float32"),
        ([("a", torch.zeros(2, dtype=torch.float16))], "a is torch.float16"),
    ],
)
def test_a_stream_that_breaks_its_word_leaves_no_file(tmp_path, tensors, message):
    wanted = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match=message):
        write_stream(tmp_path / "a.safetensors", wanted, tensors)
    assert os.listdir(tmp_path) == []


def test_opened_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x.safetensors"), opened(tmp_path / "x.safetensors"):
        pass
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"dir.safetensors"), opened(tmp_path / "dir.safetensors"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folder")
def test_a_rename_is_on_the_disk_when_the_block_ends(tmp_path, monkeypatch):
    """A power cut after it finds the new file: the data before the rename, the folder's list of names after it."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_replace(*paths):
        steps.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with files.replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert steps == ["file", "rename", "folder"]
    steps.clear()
    with files.replacing_folder(tmp_path / "model") as temporary:
        (temporary / "transformer").mkdir()
        (temporary / "transformer" / "config.json").write_text("{}")
    assert steps == ["folder", "file", "folder", "rename", "folder"]
    assert (tmp_path / "model" / "transformer" / "config.json").is_file()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with files.replacing_folder(tmp_path / "model") as temporary:
        (temporary / "old").touch()

    def stopped():
        with files.replacing_folder(tmp_path / "model") as temporary:
            (temporary / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
