"""Captions from files as people and programs write them: encodings, endings, and values that are no text."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train import captions
from train.data import FolderData, open_source
from train.samples import SampleError, printable

TEXT = "the cat’s hat, naïve 猫 🙂"
ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf-16 le": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16 be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32 le": b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"),
    "utf-32 be": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
}


def folder_with(path, files):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / "a.png")
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def opened(path, **settings):
    return open_source(FolderData(type="folder", path="", pixels=32, multiple=8, **settings), path)


@pytest.mark.parametrize("ending", ["txt", "TXT", "Txt", "caption", "CAPTION", "json", "JSON", "jsonl"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings_and_endings(tmp_path, encoding, ending):
    codec = encoding.split(" with")[0].replace(" ", "-")
    mark = ENCODED[encoding][: -len(TEXT.encode(codec))]
    name, content = f"a.{ending}", f"  {TEXT}\r\n"
    if ending.lower() == "json":
        content = json.dumps({"caption": f" {TEXT} "}, ensure_ascii=False)
    if ending == "jsonl":
        row = {"file_name": "./a.png", "text": f" {TEXT}\u2028\x85"}
        name, content = "metadata.jsonl", "\r\n" + json.dumps(row, ensure_ascii=False) + "\r\n\n"
    source = opened(folder_with(tmp_path, {name: mark + content.encode(codec)}))
    assert [source.caption(i) for i in range(len(source))] == [TEXT]


@pytest.mark.parametrize("name", ["a.txt", "a.CAPTION"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"the cat\x92s hat", "not utf-8 text"),
        (b"\xff\xfea", "not utf-16 text"),
        (b"\xff\xfe\x00\xd8", "not utf-16 text"),  # half a character
        ("a cat".encode("utf-16-le"), "NUL at character 1"),
        (b"a\0b", "NUL at character 1"),
        (b"\xed\xa0\x80", "not utf-8 text"),
        (b"x" * 100_000, "100000 characters"),
        (b"x" * (17 << 20), "more than 16777216 bytes"),
    ],
)
def test_what_is_no_caption_file_is_named(tmp_path, name, data, reason):
    begin = time.monotonic()
    with pytest.raises(SampleError, match=f"{name}: .*{reason}"):
        opened(folder_with(tmp_path, {name: data}))
    assert time.monotonic() - begin < 5


def test_another_encoding_is_read_where_the_recipe_says_so(tmp_path):
    path = folder_with(tmp_path, {"a.txt": "the cat’s hat".encode("cp1252")})
    assert opened(path, text_encoding="cp1252").caption(0) == "the cat’s hat"
    with pytest.raises(SampleError, match=r"a\.txt: not utf-8 text .*text_encoding"):
        opened(path)


@pytest.mark.parametrize("field", ["caption", "text"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [("x", "x"), ("", ""), (["x", "y"], "x"), (5, "5"), ([7], "7")],
)
def test_json_values_that_are_captions(tmp_path, field, value, expected):
    assert opened(folder_with(tmp_path, {"a.json": json.dumps({field: value}).encode()})).caption(0) == expected


BAD = [1.5, True, {"en": "x"}, [["x"]], [None], ["x", 2.5], "a\0b", "x" * 100_000, 10**30]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("table", [False, True])
def test_json_values_that_are_none_are_named(tmp_path, value, table):
    record = {"file_name": "a.png", "caption": value}
    name = "metadata.jsonl" if table else "a.json"
    with pytest.raises(SampleError, match=r"metadata\.jsonl, line 1: " if table else r"a\.json: "):
        opened(folder_with(tmp_path, {name: json.dumps(record).encode()}))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"5",
        b'{"text": "x"}',
        b'{"file_name": 5}',
        b'{"file_name": "", "text": "x"}',
        b"\xff",
        b'{"file_name": "a.png", "text": "\\ud83d"}',
        b"[" * 100_000,
        b'{"file_name": "a.png", "text": ' + b"9" * 5000 + b"}",
        b'"' + b"x" * (17 << 20) + b'"',
    ],
)
def test_damaged_lines_of_json_are_named(tmp_path, line):
    with pytest.raises(SampleError, match=r"metadata\.jsonl, line [23]: "):
        opened(folder_with(tmp_path, {"metadata.jsonl": b"\n\n" + line + b"\n"}))


def test_no_caption_is_counted(tmp_path, capsys):
    path = folder_with(tmp_path, {"a.json": b'{"caption": null}', "b.json": b'{"caption": []}', "c.json": b"{}"})
    for name in "bcd":
        (path / f"{name}.png").write_bytes((path / "a.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"no captioned image .*4 images without a caption: a\.png, b\.png, c\.png, d\.png"
    ):
        opened(path)
    (path / "e.png").write_bytes((path / "a.png").read_bytes())
    (path / "e.txt").write_text(" \n")
    source = opened(path)
    assert source.caption(0) == ""
    said = capsys.readouterr().err
    assert "1 samples" in said
    assert "4 images without a caption: a.png, b.png, c.png, d.png" in said
    assert "1 samples whose caption is empty, which are used: e.png" in said


def test_of_several_places_the_first_is_taken(tmp_path):
    places = {
        "a.txt": b"1",
        "a.caption": b"2",
        "metadata.jsonl": b'{"file_name": "a.png", "caption": "3", "text": "x"}',
    }
    places["a.json"] = b'{"text": "4"}'
    path = folder_with(tmp_path, places)
    for expected, name in enumerate(places, start=1):
        assert opened(path).caption(0) == str(expected)
        (path / name).unlink()


def test_two_lines_for_one_image_and_lines_without_one_are_said(tmp_path, capsys):
    rows = [{"file_name": name, "text": text} for name, text in (("a.png", "1"), ("a.png", "2"), ("../../b.png", "3"))]
    source = opened(folder_with(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()}))
    assert source.caption(0) == "1"
    said = capsys.readouterr().err
    assert "1 further lines of metadata.jsonl for one image: a.png in line 2" in said
    assert "1 lines of metadata.jsonl whose image is not there" in said


def test_prompts_are_read_the_same_way(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe" + "a\u2028b\r\n\r\n 猫 \rc".encode("utf-16-le"))
    assert captions.read_lines(path) == ["a\u2028b", "猫", "c"]
    path.write_bytes(b"a\n\x92")
    with pytest.raises(SampleError, match=r"p\.txt: not utf-8 text"):
        captions.read_lines(path)


@settings(max_examples=300, deadline=2000)
@given(st.binary(max_size=200))
def test_random_bytes_are_text_or_refused(data):
    for read in (captions.text_of, lambda d: captions.captions_of_json(d, "x.json")):
        try:
            found = read(data)
        except ValueError:
            continue
        assert isinstance(found, str | list)
        "".join(found).encode("utf-8")


@settings(max_examples=300)
@given(
    st.text(st.characters(), max_size=400) | st.binary(max_size=50).map(lambda b: b.decode("utf-8", "surrogateescape"))
)
def test_names_can_be_shown_and_stored(name):
    shown = printable(name)
    shown.encode("utf-8")
    assert shown.isprintable()
    assert len(shown) <= 300
    if name.isprintable() and len(name) <= 300:
        assert shown == name


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([{"text": " a ", "weight": 3}, "b"], [("a", 3.0), ("b", 1.0)]),
        ([{"text": ""}], [("", 1.0)]),
    ],
)
def test_alternatives_have_weights(value, found):
    assert [(str(text), captions.weight_of(text)) for text in captions.captions_of(value)] == found


@pytest.mark.parametrize(
    "item", [{"text": "a", "weight": 0}, {"text": "a", "weight": "3"}, {"text": "a", "weight": True}, {"weight": 1},
             {"text": "a", "score": 1}, {"text": 5}, {"text": "a", "weight": float("nan")}],
)  # fmt: skip
def test_alternatives_that_are_none_are_refused(item):
    with pytest.raises(ValueError, match="caption"):
        captions.captions_of(["x", item])
