"""GGUF files of python -m dcgen.quantize, read back with the gguf package."""

import sys
from pathlib import Path

import pytest
import torch

from dcgen.adapter import load_adapter
from dcgen.merge import merged_model, split
from dcgen.quantize.__main__ import main
from dcgen.quantize.gguf_file import GGUF_FORMATS, write_gguf
from dcgen.quantize.plan import plan
from dcgen.release import open_model

gguf = pytest.importorskip("gguf")
TOY = Path(__file__).resolve().parents[2] / "toy"
# Of the weights, relative: half a step of 2**bits even steps over the range of 32 normal values, evenly distributed.
ERRORS = {"gguf-q8_0": 0.006, "gguf-q5_1": 0.041, "gguf-q5_0": 0.046, "gguf-q4_1": 0.085, "gguf-q4_0": 0.095}


@pytest.fixture(scope="module")
def blocks():
    base = open_model(TOY / "flux-base")
    return split(merged_model(base, load_adapter(TOY / "adapter" / "toy-flux-dcgen.safetensors")))[0]


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_read_back(tmp_path, blocks, name):
    write_gguf(blocks, tmp_path / "a.gguf", GGUF_FORMATS[name])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "flux"
    units = {unit.entry.name: unit for unit in plan(blocks, GGUF_FORMATS[name])}
    assert [tensor.name for tensor in reader.tensors] == list(units)
    kinds = set()
    for tensor in reader.tensors:
        unit = units[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == unit.entry.shape
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(unit.entry.shape)
        wanted = unit.read().float()
        if unit.stored is None:
            assert found.equal(wanted), tensor.name
            assert tensor.tensor_type.name == ("BF16" if wanted.ndim > 1 else "F32")
            continue
        kinds.add(tensor.tensor_type.name)
        error = float((found - wanted).norm() / wanted.norm())
        least = ERRORS[f"gguf-{tensor.tensor_type.name.lower()}"]
        assert least / 2 < error < 1.2 * least, tensor.name
    assert kinds == {GGUF_FORMATS[name].core, "Q8_0"}


@pytest.mark.parametrize("case", ["suffix", "deep", "family", "no package"])
def test_what_no_loader_reads_is_refused(tmp_path, capsys, monkeypatch, case):
    family = "sana" if case == "family" else "flux"
    arguments = [TOY / f"{family}-base", "--format", "gguf-q8_0", "-o", tmp_path / "a.gguf"]
    if case == "suffix":
        arguments[-1] = tmp_path / "a.safetensors"
    if case == "deep":
        arguments += ["--adapter", TOY / "adapter" / "toy-flux-dcgen.safetensors"]
    if case == "no package":
        monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([*map(str, arguments)]) == 1
    said = capsys.readouterr().err
    wanted = {"suffix": ".gguf", "deep": "--split", "family": "SANA", "no package": "pip install gguf"}[case]
    assert wanted in said
    assert not list(tmp_path.iterdir())
