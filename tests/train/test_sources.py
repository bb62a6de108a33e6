"""Folders, tars and parquet files as strangers make them: each fault is named, each sample left out is counted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data import FolderData, ParquetData, TarData, open_source
from train.samples import SampleError
from train.sources import parquet, webdataset

GEOMETRY = {"pixels": 32, "multiple": 8, "ratios": (0.5, 1.0, 2.0)}


def png(value=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path, **more):
    return open_source(FolderData(type="folder", path="", **GEOMETRY, **more), path)


def webset(path, **more):
    return open_source(TarData(type="webdataset", path="", **GEOMETRY, **more), path)


def table(path, **more):
    return open_source(ParquetData(type="parquet", path="", **GEOMETRY, **more), path)


def samples(source):
    """{name: (caption, grey level)} after reading everything."""
    return {source.name(i): (source.caption(i), level(source, i)) for i in range(len(source))}


def level(source, index):
    return round((source.image(index).mean().item() + 1) * 127.5)


def put(path, name, value=0, caption="x"):
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.png").write_bytes(png(value))
    if caption is not None:
        (path / f"{name}.txt").write_text(caption)


def pack(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# --- folders


def test_linked_folders_are_followed_once(tmp_path, capsys):
    put(tmp_path / "elsewhere" / "deep", "a", 9)
    put(tmp_path / "data", "b", 7)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert samples(folder(tmp_path / "data")) == {"b.png": ("x", 7), "link/deep/a.png": ("x", 9)}
    (tmp_path / "data" / "second").symlink_to(tmp_path / "elsewhere")
    assert len(folder(tmp_path / "data")) == 2
    assert "1 folders that links reach twice, read once" in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", "..", "../../data", "../../back"])
def test_loops_of_links_are_refused(tmp_path, target):
    put(tmp_path / "data" / "sub", "a")
    (tmp_path / "back").symlink_to("data")
    (tmp_path / "data" / "sub" / "loop").symlink_to(target)
    for opener in (folder, webset, table):
        with pytest.raises(ValueError, match="loop: a link that leads back"):
            opener(tmp_path / "data")


def test_folders_that_link_to_each_other_are_read_once(tmp_path, capsys):
    put(tmp_path / "a", "x")
    put(tmp_path / "b", "y")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    assert set(samples(folder(tmp_path))) == {"a/x.png", "b/y.png"}
    assert "2 folders that links reach twice, read once" in capsys.readouterr().err


def test_odd_entries_of_a_folder(tmp_path, capsys):
    put(tmp_path, "a", 5)
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.caption")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "linked.png").symlink_to("a.png")
    (tmp_path / "linked.txt").symlink_to("a.txt")
    for hidden in ("._a.png", "__MACOSX/b.png", ".git/c.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"junk")
    source = folder(tmp_path)
    assert samples(source) == {"a.png": ("x", 5), "linked.png": ("x", 5)}
    said = capsys.readouterr().err
    for words in (
        "2 links to nothing",
        "2 pipes, sockets or devices",
        "1 images of kinds that are not read (.heic): photo",
    ):
        assert words in said


def test_names_that_are_no_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9\n")
    put(tmp_path, name, 5, "x")
    source = folder(tmp_path)
    assert samples(source) == {"caf\\xe9\\n.png": ("x", 5)}
    json.dumps([source.identity(), source.name(0)], ensure_ascii=False).encode("utf-8")
    (tmp_path / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(SampleError, match=r"caf\\xe9\\n\.png: no image"):
        folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_that_may_not_be_read(tmp_path):
    put(tmp_path, "a")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(SampleError, match=r"a\.png: Permission denied"):
        folder(tmp_path)
    (tmp_path / "sub").mkdir(mode=0)
    with pytest.raises(PermissionError, match="sub"):
        folder(tmp_path)


def test_a_file_for_a_folder(tmp_path):
    put(tmp_path, "a")
    with pytest.raises(NotADirectoryError, match=r"a\.png is a file"):
        folder(tmp_path / "a.png")


def test_a_pipe_for_the_data_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    for opener in (folder, webset, table):
        with pytest.raises((ValueError, OSError), match=r"x is (neither a folder nor a file|a file)"):
            opener(tmp_path / "x")


def test_all_damaged_samples_are_named_at_once_or_left_out(tmp_path, capsys):
    for name in "abcdefgh":
        put(tmp_path, name)
    for name in "bcdefg":
        (tmp_path / f"{name}.png").write_bytes(b"<html>")
    with pytest.raises(SampleError, match=r"6 samples of .*b\.png: .*f\.png: .*and 1 more"):
        folder(tmp_path)
    (tmp_path / "h.txt").write_bytes(b"\x92")
    (tmp_path / "a.png").write_bytes(png(3)[:-30])  # the header is whole, the pixels are not
    put(tmp_path, "i", 8)
    capsys.readouterr()
    assert samples(folder(tmp_path, unreadable="skip")) == {"i.png": ("x", 8)}
    assert "8 damaged samples: " in capsys.readouterr().err


def test_a_size_comes_from_the_header_and_damage_behind_it_is_named_when_it_is_read(tmp_path):
    put(tmp_path, "a")
    (tmp_path / "a.png").write_bytes(png(3, (64, 128))[:45])
    source = folder(tmp_path)
    assert source.size(0) == (48, 24)
    with pytest.raises(SampleError, match=r"a\.png: "):
        source.image(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(SampleError, match=r"a\.png: No such file"):
        source.image(0)


def test_settings_of_older_runs_keep_their_digest():
    old = {"path": "x", "pixels": 512, "multiple": 64, "planned": None, "ratios": (1.0,), "type": "folder"}
    assert FolderData(type="folder", path="x").model_dump() == old
    assert FolderData(type="folder", path="x", unreadable="skip").model_dump() == {**old, "unreadable": "skip"}


# --- identity


@pytest.mark.parametrize("kind", [folder, webset, table])
def test_identity_changes_with_the_bytes_of_images_and_captions(tmp_path, kind):
    def write(value, caption):
        if kind is folder:
            put(tmp_path, "a", value, caption)
        elif kind is webset:
            pack(tmp_path / "x.tar", [("a.png", png(value)), ("a.txt", caption.encode())])
        else:
            pq.write_table(pa.table({"image": [png(value)], "text": [caption]}), tmp_path / "x.parquet")
        for file in tmp_path.iterdir():
            os.utime(file, ns=(write.clock, write.clock))

    write.clock = 10**18
    write(1, "x")
    first = kind(tmp_path)
    content = first.content_digest()
    assert kind(tmp_path).identity() == first.identity()
    json.dumps(first.identity())
    write(1, "y")
    assert kind(tmp_path).identity() != first.identity()
    write.clock += 1
    write(2, "x")
    assert kind(tmp_path).identity() != first.identity()
    # the digest of the content does not ask when a file was written
    write(1, "x")
    assert kind(tmp_path).content_digest() == content
    for value, caption in ((2, "x"), (1, "y")):
        write(value, caption)
        assert kind(tmp_path).content_digest() != content


# --- tars


def test_keys_end_at_the_first_dot(tmp_path, capsys):
    members = [("d.x/a.png", png(1)), ("d.x/a.seg.png", png(2)), ("d.x/a.txt", b"one"), ("d.x/a.seg.txt", b"no")]
    members += [
        ("./b.JPG", png(3)),
        ("./b.CAPTION", b"two"),
        ("c.v1.png", png(4)),
        ("c.v1.txt", b"three"),
        ("README", b""),
    ]
    members += [("._e.png", b"junk"), ("__MACOSX/f.png", b"junk"), ("g.json", b'{"caption": "y"}'), ("h.png", png(5))]
    pack(tmp_path / "x.tar", members)
    assert samples(webset(tmp_path)) == {"x.tar:d.x/a": ("one", 1), "x.tar:./b": ("two", 3)}
    said = capsys.readouterr().err
    assert "2 samples without an image: x.tar:c, x.tar:g" in said
    assert "1 images without a caption: x.tar:h" in said


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    members = [("/etc/a.png", png(1)), ("/etc/a.txt", b"x"), ("../../b.png", png(2)), ("../../b.txt", b"y")]
    pack(tmp_path / "x.tar", members)
    assert samples(webset(tmp_path)) == {"x.tar:/etc/a": ("x", 1), "x.tar:../../b": ("y", 2)}
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_counted(tmp_path, capsys, kind):
    info = tarfile.TarInfo("b.png")
    info.type, info.linkname = kind, "/etc/hostname"
    pack(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"x"), (info, b""), ("b.txt", b"y")])
    assert samples(webset(tmp_path)) == {"x.tar:a": ("x", 1)}
    said = capsys.readouterr().err
    assert "1 links, devices or folders in a tar: x.tar:b.png" in said
    assert "1 samples without an image: x.tar:b" in said


GOOD = [("a.png", png(1)), ("a.txt", b"x")]


def with_size(name, size, kind=tarfile.REGTYPE):
    """A header that declares `size` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def negative(name):
    """A header of size -1024 in base 256."""
    block = bytearray(with_size(name, 0))
    block[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


DAMAGE = {
    "terabyte image": with_size("b.png", 1 << 40),
    "terabyte caption": with_size("a.caption", 1 << 40),
    "terabyte long name": with_size("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "terabyte pax header": with_size("x", 1 << 40, tarfile.XHDTYPE),
    "gigabyte pax header": with_size("x", 1 << 30, tarfile.XHDTYPE),
    "negative size": negative("b.png"),
    "chain of long names": with_size("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 5000,
    "wrong checksum": b"x" * 512,
    "text": b"hello",
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("first", [True, False])
def test_damaged_headers_are_named(tmp_path, what, first):
    good = pack(tmp_path / "x.tar", GOOD).read_bytes()
    whole = good[:2048] if not first else b""
    (tmp_path / "x.tar").write_bytes(whole + DAMAGE[what] + (bytes(1024) if what != "text" else b""))
    begin = time.monotonic()
    with pytest.raises(SampleError, match=r"x\.tar"):
        webset(tmp_path)
    assert time.monotonic() - begin < 5


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = pack(tmp_path / "x.tar", [*GOOD, ("b.png", png(2)), ("b.txt", b"y")]).read_bytes()
    expected, end = samples(webset(tmp_path)), 8 * 512
    assert len(expected) == 2
    for length in [*range(0, len(whole), 256), end - 1, end, end + 1]:
        (tmp_path / "x.tar").write_bytes(whole[:length])
        if length >= end + 512:
            assert samples(webset(tmp_path)) == expected
        else:
            with pytest.raises(SampleError, match=r"x\.tar"):
                webset(tmp_path)


def test_joined_compressed_and_other_tars(tmp_path, capsys):
    one = pack(tmp_path / "x.tar", GOOD).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + one)
    with pytest.raises(SampleError, match=r"x\.tar: it goes on behind the mark of its end"):
        webset(tmp_path)
    pack(tmp_path / "x.tar", GOOD, "w:gz")
    with pytest.raises(SampleError, match=r"x\.tar: compressed with gzip"):
        webset(tmp_path)
    pack(tmp_path / "x.tar", [*GOOD, *GOOD])
    with pytest.raises(SampleError, match=r"x\.tar: a\.png is in it twice"):
        webset(tmp_path)
    pack(tmp_path / "x.tar", GOOD)
    (tmp_path / "x.tar").rename(tmp_path / "X.TAR")
    pack(tmp_path / "y.tar.gz", GOOD, "w:gz")
    (tmp_path / "._X.TAR").write_bytes(b"junk")
    assert samples(webset(tmp_path)) == {"X.TAR:a": ("x", 1)}
    assert "1 compressed tars, which are not read: decompress them: y.tar.gz" in capsys.readouterr().err
    assert samples(webset(tmp_path / "X.TAR")) == {"X.TAR:a": ("x", 1)}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_layouts_of_tar(tmp_path, layout):
    long = "d/" * 40 + "ü" * 40 if layout != tarfile.USTAR_FORMAT else "d/a"
    pack(tmp_path / "x.tar", [(f"{long}.png", png(1)), (f"{long}.txt", b"x")], format=layout)
    assert samples(webset(tmp_path)) == {f"x.tar:{long}": ("x", 1)}


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("layout", ["--format=gnu", "--format=posix"])
def test_sparse_members_are_named(tmp_path, layout):
    import subprocess

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.png").write_bytes(png(1))
    (tmp_path / "work" / "a.txt").touch()
    os.truncate(tmp_path / "work" / "a.txt", 1 << 40)
    made = ["tar", layout, "-S", "-C", tmp_path / "work", "-cf", tmp_path / "x.tar", "a.png", "a.txt"]
    subprocess.run(made, check=True)
    with pytest.raises(SampleError, match=r"x\.tar: a\.txt: a sparse file"):
        webset(tmp_path / "x.tar")


def test_no_tar_or_table_stays_open(tmp_path):
    for number in range(30):
        pack(tmp_path / f"{number}.tar", GOOD)
        pq.write_table(pa.table({"image": [png(1)], "text": ["x"]}), tmp_path / f"{number}.parquet")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sources = webset(tmp_path), table(tmp_path)
    for source in sources:
        assert len(samples(source)) == 30
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 1


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.integers(0, 8 * 512 - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_of_a_tar_give_a_named_error_or_samples(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    data = bytearray(pack(path, [*GOOD, ("b.png", png(2)), ("b.json", b'{"text": "y"}')]).read_bytes())
    for place, value in edits:
        data[place] = value
    path.write_bytes(data)
    try:
        found = samples(webset(path))
    except ValueError as error:
        assert "fuzz.tar" in str(error)  # noqa: PT017
    else:
        assert all(isinstance(caption, str) for caption, _ in found.values())


# --- parquet


def write(path, images, texts, **options):
    columns = {"image": images, "text": texts}
    pq.write_table(pa.table(columns), path / "x.parquet", **options)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [png(value) for value in (1, 2, 3)]
TEXTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "images",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary()).dictionary_encode(),
        pa.array([{"bytes": data, "path": "p"} for data in IMAGES], STRUCT),
    ],
    ids=["bytes", "large", "dictionary", "struct"],
)
@pytest.mark.parametrize(
    "texts",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([[text, "other"] for text in TEXTS]),
    ],
    ids=["text", "large", "dictionary", "list"],
)
def test_layouts_of_parquet(tmp_path, images, texts):
    write(tmp_path, images, texts, row_group_size=2)
    expected = {f"x.parquet:{row}": (text, row + 1) for row, text in enumerate(TEXTS)}
    assert samples(table(tmp_path)) == expected


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    cells = [
        {"bytes": png(1)},
        None,
        {"bytes": None, "path": "p.png"},
        {"bytes": b""},
        {"bytes": png(5)},
        {"bytes": png(6)},
    ]
    write(tmp_path, pa.array(cells, STRUCT), ["a", "b", "c", "d", None, ""])
    assert samples(table(tmp_path)) == {"x.parquet:0": ("a", 1), "x.parquet:5": ("", 6)}
    said = capsys.readouterr().err
    assert "3 samples without an image: x.parquet:1, x.parquet:2, x.parquet:3" in said
    assert "1 images without a caption: x.parquet:4" in said


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (["text", "t", "t"], TEXTS),
        ([1, 2, 3], TEXTS),
        (pa.array([{"path": "x"}] * 3), TEXTS),
        (pa.array([[data] for data in IMAGES]), TEXTS),
        (IMAGES, [1.5, 2.5, 3.5]),
        (IMAGES, [True, False, True]),
        (IMAGES, [{"en": "x"}] * 3),
        (IMAGES, [[["x"]]] * 3),
        (IMAGES, [b"x"] * 3),
    ],
)
def test_other_types_of_columns_are_named(tmp_path, images, texts):
    write(tmp_path, images, texts)
    with pytest.raises(SampleError, match=r"x\.parquet: column '(image|text)"):
        table(tmp_path)


def test_damaged_rows_are_named(tmp_path, capsys):
    write(tmp_path, [png(1), b"<html>", png(3)[:-25]], ["a", "b", "c"])
    with pytest.raises(SampleError, match=r"1 samples .*x\.parquet, row 1: no image"):
        table(tmp_path)
    assert list(samples(table(tmp_path, unreadable="skip"))) == ["x.parquet:0"]
    assert "2 damaged samples" in capsys.readouterr().err
    write(tmp_path, [png(1), png(3)[:-25]], ["a", "c"])
    with pytest.raises(SampleError, match=r"x\.parquet, row 1: "):
        table(tmp_path).image(1)
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xff\xff"))
    write(tmp_path, [png(1)], text)
    with pytest.raises(SampleError, match=r"x\.parquet, row 0: "):
        table(tmp_path)


def test_columns_that_are_twice_or_not_there(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array(IMAGES)] * 2 + [pa.array(TEXTS)], ["image", "image", "text"]),
        tmp_path / "x.parquet",
    )
    with pytest.raises(SampleError, match=r"x\.parquet has more than one column 'image'"):
        table(tmp_path)
    write(tmp_path, IMAGES, TEXTS)
    with pytest.raises(SampleError, match=r"x\.parquet has no column 'caption'"):
        table(tmp_path, caption_column="caption")


@pytest.mark.parametrize("column", ["image", "text"])
def test_a_dictionary_that_unfolds_to_more_than_memory_is_refused(tmp_path, column, monkeypatch):
    monkeypatch.setattr(parquet, "UNFOLD_BYTES", 1 << 24)
    monkeypatch.setattr(parquet, "UNFOLD_TIMES", 4)
    large, count = os.urandom(1 << 20), 20_000
    images = [png(1) + large] * count if column == "image" else [png(1)] * count
    texts = [large.hex()] * count if column == "text" else ["x"] * count
    dictionary = lambda values: pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), values[:1])  # noqa: E731
    write(tmp_path, dictionary(images), dictionary(texts))
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 23
    begin = time.monotonic()
    with pytest.raises(SampleError, match=r"x\.parquet: .*(unfold to more|rows in)"):
        table(tmp_path)
    assert time.monotonic() - begin < 5


def test_more_rows_than_bytes_are_refused(tmp_path):
    write(tmp_path, pa.nulls(5_000_000), pa.nulls(5_000_000))
    with pytest.raises(SampleError, match=r"x\.parquet: 5000000 rows in \d+ bytes"):
        table(tmp_path)


def test_row_groups_beyond_what_is_kept_are_read_row_by_row(tmp_path, monkeypatch):
    write(tmp_path, [png(value) for value in range(40)], [str(value) for value in range(40)], row_group_size=20)
    expected = samples(table(tmp_path))
    assert [value for _, value in expected.values()] == list(range(40))
    for kept in (0, 2500):
        monkeypatch.setattr(parquet, "KEPT_BYTES", kept)
        source = table(tmp_path)
        order = np.random.default_rng(0).permutation(40)
        assert [level(source, index) for index in order] == order.tolist()
        assert sum(source.group_bytes[key] for key in source.kept) <= kept


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_a_parquet_file_give_a_named_error_or_samples(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp()
    write(path, pa.array([{"bytes": data, "path": "p"} for data in IMAGES], STRUCT), TEXTS)
    data = bytearray((path / "x.parquet").read_bytes())
    for place, value in edits:
        data[int(place * len(data))] = value
    (path / "x.parquet").write_bytes(data)
    try:
        found = samples(table(path / "x.parquet"))
    except ValueError as error:
        assert "x.parquet" in str(error)  # noqa: PT017
    else:
        assert all(isinstance(caption, str) for caption, _ in found.values())


def test_limits_are_no_smaller_than_data_sets_need():
    assert webdataset.HEADER_BYTES >= 1 << 20
    assert parquet.UNFOLD_BYTES >= 1 << 28
