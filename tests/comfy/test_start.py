"""What ComfyUI waits for: importing the pack, listing models, and the files that are opened to load one."""

import pytest

RELEASE = {
    "model_index.json",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "text_encoder/config.json",
}


@pytest.mark.once_per_core
def test_importing_the_pack_imports_nothing_heavy(comfy, tmp_path):
    _, found = comfy.run("start:imported", tmp_path, alone=True)
    assert "DCGenReleaseLoader" in found["nodes"]


@pytest.mark.once_per_core
def test_listing_looks_at_one_file_of_each_release(comfy, tmp_path):
    """500 releases, and a folder that is none: what a release holds is not listed."""
    folder = tmp_path / "models"
    for i in range(500):
        (folder / f"release-{i:03}" / "transformer").mkdir(parents=True)
        (folder / f"release-{i:03}" / "model_index.json").touch()
    (folder / "other" / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "model_index.json").touch()
    _, found = comfy.run("start:listing", tmp_path, params={"folder": str(folder)})
    assert [name for name in found["names"] if not name.startswith("toy/")] == [f"release-{i:03}" for i in range(500)]
    assert found["tested"] == 502
    assert found["scanned"] == 3  # the search path, other, other/inner


@pytest.fixture(scope="module")
def opened(comfy, tmp_path_factory, base_release, deep_release):
    folder = tmp_path_factory.mktemp("opened")
    params = {"releases": {"base": str(base_release[0]), "deep": str(deep_release[0])}, "work": str(folder)}
    return comfy.run("start:opened", folder, params=params)[1]


@pytest.mark.parametrize("kind", ["base", "deep", "toy", "sana", "network", "quantized", "plain"])
def test_each_file_of_a_release_is_opened_once(opened, kind):
    """The header of every file of weights and every JSON file; the release in shards ("deep") too."""
    counts = opened[kind]
    assert set(counts.values()) == {1}, counts
    assert any(name.endswith(".safetensors") for name in counts), counts
    if kind in ("base", "deep", "toy", "sana"):
        assert set(counts) >= RELEASE, sorted(counts)


def test_loading_only_the_network_opens_nothing_of_the_text_encoders(opened):
    assert not [name for name in opened["network"] if name.startswith(("text_encoder", "tokenizer"))]
