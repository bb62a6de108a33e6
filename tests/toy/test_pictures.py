"""The toy's data: what ships, and that a picture is a function of its numbers."""

from pathlib import Path

import pytest
import torch

from train.files import read_json
from train.toy.pictures import SIZE, Pair, ToyPictures

DATA = Path(__file__).parents[2] / "toy" / "data"


@pytest.fixture(scope="module")
def toy():
    return ToyPictures(DATA)


def test_every_subject_and_color_keeps_most_of_its_pairs(toy):
    train, held = toy.pairs("train"), toy.pairs("held_out")
    assert not set(train) & set(held)
    assert len(train) + len(held) == len(toy.pairs("all")) == len(toy.subjects) * len(toy.colors)
    assert len(held) * 8 == len(toy.pairs("all"))
    for subject in range(len(toy.subjects)):
        assert sum(p.subject == subject for p in held) == 1
    for color in range(len(toy.colors)):
        assert sum(p.color == color for p in held) == len(held) // len(toy.colors)


def test_a_picture_depends_on_its_numbers_alone(toy):
    again = ToyPictures(DATA)
    pair = Pair(3, 5)
    first = toy.draw(pair, 7)
    assert first.shape == (3, SIZE, SIZE)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1
    again.draw(Pair(0, 0), 0)  # drawing others in between changes nothing
    assert torch.equal(first, again.draw(pair, 7))
    for other in (toy.draw(pair, 8), toy.draw(pair, 7, seed=1), toy.draw(Pair(4, 5), 7), toy.draw(Pair(3, 4), 7)):
        assert (first - other).abs().mean() > 0.01


def test_the_background_has_the_color_that_the_caption_names(toy):
    described = read_json(DATA / "captions.json")["colors"]
    for number, color in enumerate(described):
        pair = Pair(6, number)
        assert toy.caption(pair).endswith(f" on a {color['name']} background")
        picture = (toy.draw(pair, 0) + 1) * 127.5
        edge = torch.cat([picture[:, :, :6], picture[:, :, -6:]], dim=2).mean((1, 2))
        torch.testing.assert_close(edge, torch.tensor(color["rgb"], dtype=torch.float32), atol=3, rtol=0)


def test_wrong_folder_and_split_say_what_to_do(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions\.json not found.*build_data"):
        ToyPictures(tmp_path)
    with pytest.raises(ValueError, match="expected all, train or held_out"):
        toy.pairs("test")


def test_the_licence_of_the_pictures_ships():
    notice = (DATA / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Microsoft" in notice
    assert "Miles Johnson" in notice
    assert all(source["licence"] == "MIT" for source in read_json(DATA / "captions.json")["sources"])
