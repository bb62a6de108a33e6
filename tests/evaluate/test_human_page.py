"""The page of the human evaluation, in Chromium: 20 raters whose preferences are known, and what becomes of them."""

from __future__ import annotations

import functools
import http.server
import json
import random
import re
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from train.evaluate.human import analyse, make_page, read_answers, read_key

RATERS = 20
KEYS = {"quality": "ASD", "alignment": "JKL"}
SHARES = {"quality": {"A": 0.5, "B": 0.3, "=": 0.2}, "alignment": {"A": 0.2, "B": 0.2, "=": 0.6}}


@pytest.fixture
def study(tmp_path, draw_folder):
    """(page folder, key file) of five pairs; the first model's images are dark, the second's bright."""
    first, second = draw_folder(tmp_path / "dark", 40, 5), draw_folder(tmp_path / "bright", 210, 5)
    key = make_page(first, second, tmp_path / "study", ("dark", "bright"), title="<b>Cats & dogs</b>")
    return tmp_path / "study", key


def press(browser, code: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, code=code, key=code)


def click(browser, element: str) -> None:
    x, y = browser.js(box(element))
    for kind, held in (("mouseMoved", False), ("mousePressed", True), ("mouseReleased", False)):
        browser.mouse(kind, x, y, held)


def box(element: str) -> str:
    return f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"


def open_page(browser, url: str, rater: str) -> None:
    browser.call("Page.navigate", url=f"{url}?rater={quote(rater)}")
    browser.until("document.readyState === 'complete' && document.getElementById('start')?.open", 20)
    browser.js("document.getElementById('begin').click()")
    browser.until("imgs.every((img) => img.complete && img.naturalWidth)", 20)


def shown(browser) -> list[str]:
    """Ids of the images on the left and on the right."""
    return browser.js("imgs.map((img) => img.dataset.image)")


def answer(browser, key: dict, preferences: dict[str, dict[str, str]]) -> list[str]:
    """Answer every pair by keyboard as `preferences` say; the models on the left, in order."""
    models = {name: letter for pair in key["pairs"].values() for name, letter in zip(pair["images"], "AB", strict=True)}
    lefts = []
    for _ in key["pairs"]:
        left, right = shown(browser)
        lefts.append(models[left])
        pair = next(number for number, entry in key["pairs"].items() if left in entry["images"])
        assert right in key["pairs"][pair]["images"]
        for question, letters in KEYS.items():
            wanted = preferences[pair][question]
            press(browser, f"Key{letters[[models[left], '=', models[right]].index(wanted)]}")
        press(browser, "Enter")
    browser.until("document.getElementById('end').open", 10)
    return lefts


def save(browser, folder: Path) -> Path:
    """Click on Save answers; the file."""
    folder.mkdir(exist_ok=True)
    before = set(folder.glob("*.json"))
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.js("(document.getElementById('end').open ? $('save-end') : $('save')).click()")
    for _ in range(100):
        if found := set(folder.glob("*.json")) - before:
            return found.pop()
        browser.frame()
    raise AssertionError("no file was saved")


def test_what_twenty_raters_prefer_comes_out_as_it_went_in(study, browser, tmp_path):
    folder, key_file = study
    key = read_key(key_file)
    rng = random.Random()
    truth = {question: dict.fromkeys("AB=", 0) for question in KEYS}
    orders, lefts = set(), []
    url = (folder / "index.html").as_uri()
    for number in range(RATERS):
        preferences = {
            pair: {q: rng.choices(*zip(*s.items(), strict=True))[0] for q, s in SHARES.items()} for pair in key["pairs"]
        }
        for chosen in preferences.values():
            for question, letter in chosen.items():
                truth[question][letter] += 1
        open_page(browser, url, f"rater {number}")
        orders.add(tuple(browser.js("session.order")))
        lefts += answer(browser, key, preferences)
        save(browser, tmp_path / "answers")
    assert browser.errors == []
    answers, remarks = read_answers(key, [tmp_path / "answers"])
    assert remarks == []
    results = analyse(key, answers)
    assert (results["raters"], results["answers"]) == (RATERS, RATERS * 5)
    for question, counts in truth.items():
        found = results["rows"]["All"][question]
        for name, letter in (("first", "A"), ("second", "B"), ("equal", "=")):
            assert found[name]["value"] == pytest.approx(counts[letter] / (RATERS * 5))
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert abs(found["alpha"]) < 0.25  # each answer was drawn on its own
    assert len(orders) > RATERS // 2  # of 120
    assert 0.3 < lefts.count("A") / len(lefts) < 0.7  # two or three of five pairs are swapped for each rater


def test_answers_survive_closing_the_page_and_can_be_changed(study, browser, tmp_path):
    folder, key_file = study
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *words: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        open_page(browser, url, "Zoë")
        first = shown(browser)
        assert browser.js("$('next').disabled")
        press(browser, "KeyD")
        assert browser.js("$('next').disabled")
        press(browser, "KeyK")
        press(browser, "Enter")
        assert shown(browser) != first
        click(browser, "document.querySelector('label[for=quality-1]')")
        open_page(browser, url, "Zoë")  # after a reload
        second = shown(browser)
        assert browser.js("$('count').textContent") == "2 of 5"
        assert browser.js("[$('quality-1').checked, $('alignment-1').checked]") == [True, False]
        press(browser, "Backspace")
        assert shown(browser) == first
        assert browser.js("[$('quality-2').checked, $('alignment-1').checked]") == [True, True]
        press(browser, "KeyA")  # changed their mind
        record = json.loads(save(browser, tmp_path / "part").read_text(encoding="utf-8"))
    finally:
        server.shutdown()
    assert browser.errors == []
    assert record["rater"] == "Zoë"
    (entry,) = record["answers"]
    assert (entry["left"], entry["right"]) == tuple(first)
    assert (entry["quality"], entry["alignment"]) == (first[0], "equal")
    assert set(second).isdisjoint(first)
    answers, remarks = read_answers(read_key(key_file), [tmp_path / "part"])
    assert len(answers) == 1
    assert "Zoë answered 1 of 5 pairs" in remarks[0]


def test_zoom_shows_both_images_at_their_own_pixels_and_moves_them_together(tmp_path, draw_folder, browser):
    size = (3600, 2700)
    folders = [draw_folder(tmp_path / name, shade, 1, size) for name, shade in (("dark", 40), ("bright", 210))]
    make_page(*folders, tmp_path / "study", ("dark", "bright"), embed=True)
    open_page(browser, (tmp_path / "study" / "index.html").as_uri(), "one")
    metrics = {"width": 1200, "height": 800, "deviceScaleFactor": 2, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **metrics)  # two pixels of the screen for one of CSS
    browser.frame()
    fitted = browser.js("imgs[0].getBoundingClientRect().width")
    assert fitted < 900
    x, y = browser.js(box("scrolls[0]"))
    for kind, held in (("mousePressed", True), ("mouseReleased", False)):
        browser.mouse(kind, x + 100, y + 50, held)
    assert browser.js("imgs.map((img) => img.getBoundingClientRect().width * devicePixelRatio)") == [3600, 3600]
    before = browser.js("scrolls.map((s) => [s.scrollLeft, s.scrollTop])")
    assert min(min(before)) > 0
    browser.drag((x, y), (x - 80, y - 60))
    browser.frame()
    after = browser.js("scrolls.map((s) => [s.scrollLeft, s.scrollTop])")
    assert after[0] == after[1]
    assert after[0] == pytest.approx([before[0][0] + 80, before[0][1] + 60], abs=2)
    press(browser, "ArrowLeft")
    browser.frame()
    assert browser.js("scrolls[1].scrollLeft") == pytest.approx(after[1][0] - 120, abs=2)
    press(browser, "KeyZ")
    assert browser.js("imgs[0].getBoundingClientRect().width") == fitted
    browser.call("Emulation.clearDeviceMetricsOverride")
    assert browser.errors == []


def test_nothing_that_a_rater_gets_says_which_model_it_is(study):
    folder, key_file = study
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "<b>Cats" not in html  # the title is text, not markup
    inside = json.loads(re.search(r'id="study">(.*?)</script>', html, re.DOTALL)[1])
    assert inside["title"] == "<b>Cats & dogs</b>"
    assert not re.search("dark|bright", json.dumps(inside) + " ".join(path.name for path in folder.rglob("*")))
    key = read_key(key_file)
    assert len(list((folder / "images").iterdir())) == 10
    for pair in key["pairs"].values():
        shades = [np.asarray(Image.open(folder / "images" / f"{name}.png"))[20, 20, 0] for name in pair["images"]]
        assert shades == [40, 210]
    assert all(entry["images"] == sorted(entry["images"]) for entry in inside["pairs"])
