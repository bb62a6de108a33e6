"""Data sets from folders, tars and parquet, and pictures that the base draws itself."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import RecipeError, parse_recipe
from train.data import FolderData, ParquetData, TarData, bucket_sizes, fit, nearest_bucket, open_source
from train.distributed import Ranks
from train.run import make_stage, run_recipe


def png(color: tuple[int, int, int], width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format="PNG")
    return buffer.getvalue()


SAMPLES = [("a", (255, 0, 0), 80, 40), ("b", (0, 255, 0), 40, 80), ("c", (0, 0, 255), 60, 60)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, color, width, height in SAMPLES:
        (tmp_path / "sub" / f"{name}.png").write_bytes(png(color, width, height))
    (tmp_path / "sub" / "a.txt").write_text("caption a\n")
    rows = [{"file_name": "b.png", "text": "caption b"}, {"file_name": "c.png", "text": "caption c"}]
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sub" / "uncaptioned.png").write_bytes(png((9, 9, 9), 8, 8))
    return tmp_path


@pytest.fixture
def tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, color, width, height in SAMPLES:
            text = ("txt", f"caption {name}".encode())
            if name == "b":
                text = ("json", json.dumps({"caption": "caption b"}).encode())
            for suffix, data in (("png", png(color, width, height)), text):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return tmp_path


def check(source):
    assert [source.caption(i) for i in range(3)] == ["caption a", "caption b", "caption c"]
    # wide, tall and square pictures of area about 64^2, sides multiples of 16
    assert [source.size(i) for i in range(3)] == [(48, 96), (96, 48), (64, 64)]
    for i, (_, color, _, _) in enumerate(SAMPLES):
        image = source.image(i)
        assert tuple(image.shape) == (3, *source.size(i))
        expected = torch.tensor(color) / 127.5 - 1
        torch.testing.assert_close(image.mean((1, 2)), expected, atol=1e-5, rtol=0)


BUCKETS = {"pixels": 64, "multiple": 16, "ratios": (1.0, 0.5, 2.0)}


def test_folder(folder):
    check(open_source(FolderData(type="folder", path="", **BUCKETS), folder))


def test_webdataset(tar):
    check(open_source(TarData(type="webdataset", path="", **BUCKETS), tar))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": png(color, width, height)} for _, color, width, height in SAMPLES]
    table = pyarrow.table({"image": images, "text": [f"caption {name}" for name, *_ in SAMPLES]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    check(open_source(ParquetData(type="parquet", path="", **BUCKETS), tmp_path))
    with pytest.raises(ValueError, match="has no column 'caption'"):
        open_source(ParquetData(type="parquet", path="", caption_column="caption", **BUCKETS), tmp_path)


def test_empty_and_missing_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no captioned image"):
        open_source(FolderData(type="folder", path=""), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_source(FolderData(type="folder", path=""), tmp_path / "nowhere")


def test_buckets_have_the_area_and_the_ratio():
    for pixels in (512, 1024):
        for ratio, size in zip((0.5, 1.0, 2.0), bucket_sizes(pixels, 32, (0.5, 1.0, 2.0)), strict=True):
            assert size[0] * size[1] == pytest.approx(pixels**2, rel=0.06)
            assert size[0] / size[1] == pytest.approx(ratio, rel=0.07)
            assert size[0] % 32 == size[1] % 32 == 0
    assert nearest_bucket((300, 800), [(64, 64), (48, 96), (96, 48)]) == (48, 96)


def test_transparent_pictures_are_laid_on_white_and_cropped_in_the_middle():
    array = np.zeros((40, 80, 4), dtype=np.uint8)
    array[:, 20:60] = (255, 0, 0, 255)
    image = fit(Image.fromarray(array), (40, 40))
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=0.02, rtol=0)
    assert fit(Image.fromarray(array), (40, 80))[:, 0, 0].tolist() == [1, 1, 1]


def recipe(debug_run, out, prompts, **more):
    stage = {"base": f"{debug_run}/tiny/release", "prompts": str(prompts), "pixels": 32, "multiple": 16}
    stage |= {"sampling_steps": 2, "per_prompt": 3, "shard_size": 4, "batch": 3, "ratios": [1.0, 4.0], **more}
    return parse_recipe({"name": "s", "output": str(out), "stages": {"synthesize": stage}})


def test_synthetic_pictures_are_resumable_shared_over_ranks_and_readable(debug_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\na blue square\n")
    one = recipe(debug_run, tmp_path / "one", prompts)
    assert run_recipe(one)["synthesize"] == {"pictures": 6, "shards": 2}
    files = sorted((tmp_path / "one" / "synthesize" / "pictures").glob("*.tar"))
    source = open_source(
        TarData(type="webdataset", path="", pixels=32, multiple=16, ratios=(1.0, 4.0)), files[0].parent
    )
    assert sorted(source.caption(i) for i in range(6)) == ["a blue square"] * 3 + ["a red square"] * 3
    assert {source.size(i) for i in range(6)} == {(32, 32), (64, 16)}
    with tarfile.open(files[0]) as tar:
        record = json.load(tar.extractfile("000000002.json"))
    assert record["seed"] == 2
    assert record["caption"] == "a red square"
    # the second of two ranks makes the second shard, byte for byte
    half = make_stage(recipe(debug_run, tmp_path / "two", prompts), "synthesize", Ranks(1, 2, torch.device("cpu")))
    half.setup()
    half.finish({})
    made = sorted((tmp_path / "two" / "synthesize" / "pictures").glob("*.tar"))
    assert [path.name for path in made] == [files[1].name]
    assert made[0].read_bytes() == files[1].read_bytes()
    # a shard that is gone is made again, the others stay
    before = [path.read_bytes() for path in files]
    files[0].unlink()
    (tmp_path / "one" / "synthesize" / "done.json").unlink()
    kept = files[1].stat().st_mtime_ns
    run_recipe(one)
    assert [path.read_bytes() for path in files] == before
    assert files[1].stat().st_mtime_ns == kept
    (tmp_path / "one" / "synthesize" / "done.json").unlink()
    with pytest.raises(RecipeError, match="holds images of other settings"):
        run_recipe(recipe(debug_run, tmp_path / "one", prompts, guidance=2.0))


def test_a_missing_prompt_file_is_named(debug_run, tmp_path):
    stage = make_stage(recipe(debug_run, tmp_path, tmp_path / "no.txt"), "synthesize", Ranks(0, 1, torch.device("cpu")))
    assert "no.txt not found" in stage.check()[0]
