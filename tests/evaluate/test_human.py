"""What the answers of a human evaluation say: Table 4's shares, and files that are refused."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train.evaluate.__main__ import main
from train.evaluate.human import analyse, make_page, read_answers, read_key
from train.evaluate.images import read_folder


@pytest.fixture
def study(tmp_path, draw_folder):
    """(key file, key) of a study of twelve pairs of three domains."""
    first, second = draw_folder(tmp_path / "a", 40, 12), draw_folder(tmp_path / "b", 210, 12)
    path = make_page(first, second, tmp_path / "study", ("ours", "base"))
    return path, read_key(path)


def answers_of(key, rater, choose, **changes):
    """A file's content; choose(pair) gives "A", "B" or "=" for quality and for alignment."""
    entries = []
    for number, pair in key["pairs"].items():
        meaning = {"A": pair["images"][0], "B": pair["images"][1], "=": "equal"}
        quality, alignment = (meaning[letter] for letter in choose(pair))
        left, right = random.sample(pair["images"], 2)
        entry = {"pair": number, "left": left, "right": right, "quality": quality, "alignment": alignment}
        entries.append({**entry, "seconds": 9})
    record = {"format": key["format"], "study": key["study"], "rater": rater, "session": f"s-{rater}"}
    return {**record, "started": "2026-01-01", "saved": "2026-01-02", "pairs": 12, "answers": entries, **changes}


def write(folder, records):
    folder.mkdir(exist_ok=True)
    for number, record in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_shares_are_counted_by_domain(study, tmp_path, capsys):
    path, key = study
    people = {"general": "AA", "person": "B=", "anime": "=B"}
    records = [answers_of(key, f"r{k}", lambda pair: people[pair["domain"]]) for k in range(3)]
    folder = write(tmp_path / "answers", records)
    assert main(["human", "analyse", str(path), str(folder), "--out", str(tmp_path / "table4.json")]) == 0
    results = json.loads((tmp_path / "table4.json").read_text(encoding="utf-8"))
    assert list(results["rows"]) == ["anime", "general", "person", "All"]
    general = results["rows"]["general"]["quality"]
    assert (general["first"]["value"], general["first"]["low"], general["equal"]["value"]) == (1, 1, 0)
    assert results["rows"]["anime"]["alignment"]["second"]["value"] == 1
    assert results["rows"]["person"]["alignment"]["equal"]["value"] == 1
    counts = {domain: sum(pair["domain"] == domain for pair in key["pairs"].values()) for domain in people}
    whole = results["rows"]["All"]["quality"]
    assert whole["first"]["value"] == pytest.approx(counts["general"] / 12)
    assert whole["lead"]["value"] == pytest.approx((counts["general"] - counts["person"]) / 12)
    assert whole["alpha"] == 1  # all raters agree
    said = capsys.readouterr().out
    assert "| Visual Quality | ours is better | base is better | Equal |" in said
    assert "| general | 100.0% (100.0 to 100.0) |" in said
    assert said.split("\n")[0].startswith("3 raters, 12 pairs, 36 answers")
    assert (tmp_path / "table4.md").read_text(encoding="utf-8") in said


def test_the_sign_test_over_prompts_leaves_out_ties(study, tmp_path):
    _, key = study
    order = {number: place for place, number in enumerate(key["pairs"])}
    numbers = {tuple(pair["images"]): number for number, pair in key["pairs"].items()}

    def choose(rater):
        def letters(pair):
            place = order[numbers[tuple(pair["images"])]]
            if place < 6:
                return "AA"  # 6 prompts for A
            if place < 7:
                return "BB"  # 1 for B
            return ("A" if rater % 2 else "B") * 2  # 5 prompts with as many for either

        return letters

    folder = write(tmp_path / "answers", [answers_of(key, f"r{k}", choose(k)) for k in range(4)])
    tests = analyse(key, read_answers(key, [folder])[0])["rows"]["All"]["quality"]["sign_test"]
    assert tests["prompts"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert tests["answers"] < tests["prompts"]  # 34 to 14, as if all were independent


def test_the_file_saved_last_counts_and_an_unfinished_one_is_said(study, tmp_path):
    _, key = study
    old = answers_of(key, "r", lambda pair: "AA", saved="2026-01-02T10")
    new = answers_of(key, "r", lambda pair: "BB", saved="2026-01-02T11")
    part = answers_of(key, "q", lambda pair: "==")
    part["answers"] = part["answers"][:5]
    answers, remarks = read_answers(key, [write(tmp_path / "answers", [new, old, part])])
    assert [answer.choices["quality"] for answer in answers].count("B") == 12
    assert len(answers) == 17
    assert "1.json is left out: r saved the same session again later" in remarks[0]
    assert "q answered 5 of 12 pairs" in remarks[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"study": "another"}, "answers of study 'another'"),
        ({"format": "other"}, "answers of study"),
        ({"answers": [{"pair": "x", "quality": "equal", "alignment": "equal"}]}, "pair 'x' is not of this study"),
        ({"answers": [{"pair": "x"}]}, "quality"),
        ({"answers": "none"}, "answers"),
        ({"rater": 3}, "rater"),
    ],
)
def test_answers_that_are_not_of_the_study_are_refused_by_name(study, tmp_path, change, said):
    _, key = study
    folder = write(tmp_path / "answers", [{**answers_of(key, "r", lambda pair: "AA"), **change}])
    with pytest.raises(ValueError, match=said) as refused:
        read_answers(key, [folder])
    assert "0.json" in str(refused.value)


def test_pairs_answered_twice_unknown_images_and_two_sessions_of_a_rater_are_refused(study, tmp_path):
    _, key = study
    twice = answers_of(key, "r", lambda pair: "AA")
    twice["answers"] = [twice["answers"][0]] * 2
    with pytest.raises(ValueError, match="or is answered twice"):
        read_answers(key, [write(tmp_path / "twice", [twice])])
    foreign = answers_of(key, "r", lambda pair: "AA")
    foreign["answers"][0]["quality"] = foreign["answers"][1]["quality"]
    with pytest.raises(ValueError, match="is neither of its images nor 'equal'"):
        read_answers(key, [write(tmp_path / "foreign", [foreign])])
    other = answers_of(key, "r", lambda pair: "BB", session="another")
    with pytest.raises(ValueError, match="two sessions of rater 'r'"):
        read_answers(key, [write(tmp_path / "two", [answers_of(key, "r", lambda pair: "AA"), other])])
    with pytest.raises(FileNotFoundError, match=r"no \.json file"):
        read_answers(key, [write(tmp_path / "empty", [])])


def test_the_page_is_made_of_plain_folders_with_prompts_too(tmp_path, capsys):
    for folder, shade in (("first", 10), ("second", 200)):
        (tmp_path / folder).mkdir()
        info = PngInfo()
        info.add_text("workflow", f"made by {folder}")
        for number in range(3):
            Image.new("RGB", (40, 30), (shade, number, 0)).save(tmp_path / folder / f"{number}.png", pnginfo=info)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    given = ["human", "page", str(tmp_path / "first"), str(tmp_path / "second")]
    given += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "page")]
    assert main(given) == 0
    key = read_key(tmp_path / "page-key.json")
    assert key["names"] == ["first", "second"]
    assert sorted(pair["prompt"] for pair in key["pairs"].values()) == ["one", "three", "two"]
    for path in (tmp_path / "page" / "images").iterdir():
        assert Image.open(path).info == {}
    assert "keep it to yourself" in capsys.readouterr().out
    assert main(given) == 1
    assert "a study is not overwritten" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("one\n", encoding="utf-8")
    assert main([*given[:-1], str(tmp_path / "x")]) == 1
    assert "holds 3 images, and there are 1 prompts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_pairs_that_would_give_the_model_away_are_refused(tmp_path, draw_folder):
    first = draw_folder(tmp_path / "a", 40, 3)
    with pytest.raises(ValueError, match=r"96x64 and .* 128x64 pixels: the size would say which model"):
        make_page(first, draw_folder(tmp_path / "b", 40, 3, (128, 64)), tmp_path / "study", ("a", "b"))
    with pytest.raises(ValueError, match="pairs are files of the same name"):
        make_page(first[:1], read_folder(tmp_path / "b")[1:], tmp_path / "study", ("a", "b"))
    with pytest.raises(ValueError, match="both models are called 'a'"):
        make_page(first, first, tmp_path / "study", ("a", "a"))


def test_so_many_pairs_of_each_domain(tmp_path, draw_folder):
    first, second = draw_folder(tmp_path / "a", 40, 20), draw_folder(tmp_path / "b", 210, 20)
    key = read_key(make_page(first, second, tmp_path / "study", ("a", "b"), per_domain=5))
    domains = [pair["domain"] for pair in key["pairs"].values()]
    assert {domain: domains.count(domain) for domain in set(domains)} == {"general": 5, "person": 5, "anime": 5}
    with pytest.raises(ValueError, match="7 pairs of domain 'anime' are wanted, there are 6"):
        make_page(first, second, tmp_path / "more", ("a", "b"), per_domain=7)


def test_a_damaged_index_is_refused_by_name(tmp_path, draw_folder):
    draw_folder(tmp_path / "a", 40, 2)
    index = tmp_path / "a" / "index.json"
    record = json.loads(index.read_text(encoding="utf-8"))
    for change in ({"file": "../x.png"}, {"index": 9}, {"seed": "0"}):
        damaged = {**record, "images": [{**record["images"][0], **change}]}
        index.write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(ValueError, match=r"index\.json"):
            read_folder(tmp_path / "a")
    index.write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "a" / "000001-s0.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 images are not there"):
        read_folder(tmp_path / "a")
