"""The bytes that eager operations move: the counter, what the layers avoid, and that shared memory changes nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.traffic import Traffic
from dcgen.dcae import DCAE, VARIANTS
from dcgen.dcae.stream import HEAD, TAIL, Window, has_spare_rows, regroup, with_spare_rows


def test_bytes_are_counted_once_read_and_once_written():
    a, b = torch.ones(4, 8), torch.ones(8)
    with Traffic() as traffic:
        c = a + b.expand(4, 8)  # a view is free, and a broadcast tensor is as large as it lies in memory
        c.mul_(2)
        torch.add(a, a, out=c)
    assert traffic.bytes == 4 * ((32 + 8 + 32) + (32 + 32) + (32 + 32 + 32))


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "mix" not in name])
def test_no_image_is_copied_to_put_rows_around_it(name, way):
    """Joins of a whole image take little of the traffic: the rest of it are layers that have no place to write to."""
    config = VARIANTS[name]
    model = DCAE(config, dtype=torch.bfloat16, device="meta").eval().requires_grad_(False)
    side = 1024 // config.spatial_factor
    shape = (1, 3, 1024, 1024) if way == "encode" else (1, config.latent_channels, side, side)
    with torch.no_grad(), Traffic() as traffic:
        getattr(model, way)(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    assert traffic.by_operation.get("cat", 0) < 0.08 * traffic.bytes


@pytest.mark.parametrize("cut", [1, 2, 5, 11])
def test_rows_in_shared_memory_are_those_of_a_copy(cut):
    torch.manual_seed(cut)
    image = torch.randn(1, 3, 11, 4).contiguous(memory_format=torch.channels_last)
    roomy = with_spare_rows(image.shape, image)
    roomy.copy_(image)
    assert has_spare_rows(roomy)
    assert not has_spare_rows(image)
    for span, step, top, bottom in ((3, 1, 1, 1), (4, 2, 1, 1), (3, 2, 1, 0)):
        if top + bottom + 11 < span:
            continue
        found = []
        for source in (image, roomy):
            window, rows = Window(span, step, top, bottom), 0
            joined = []
            for chunk in regroup(iter([source]), cut):
                rows += chunk.shape[2]
                out = window(chunk, rows == 11)
                joined += [] if out is None else [out.clone()]
            found.append(joined)
        assert [part.shape for part in found[0]] == [part.shape for part in found[1]]
        assert all(map(torch.equal, *found))
        assert torch.equal(roomy, image)


def test_a_whole_chunk_takes_its_zeros_without_a_copy():
    chunk = with_spare_rows((1, 2, 5, 3), torch.empty(0))
    chunk.normal_()
    joined = Window(3, 1, 1, 1)(chunk, True)
    assert joined is not None
    assert joined.shape[2] == 7
    assert joined.untyped_storage().data_ptr() == chunk.untyped_storage().data_ptr()
    assert joined[:, :, 0].abs().max() == 0
    assert joined[:, :, -1].abs().max() == 0
    assert torch.equal(joined[:, :, 1:-1], chunk)
    assert HEAD >= 1
    assert TAIL >= 1
