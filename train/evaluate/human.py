"""Human evaluation (arXiv:2509.25180 Fig. 14, Table 4): a page of image pairs, and what its answers say.

`make_page` writes one static page. Image names in it are random, so that neither the page nor its files say which model
made what; that is in a key file beside the page, which `analyse` needs and nobody else should see.
"""
# A, B: the first and the second model

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dcgen.fields import check_fields, items, mapping, text
from dcgen.files import naming
from train.evaluate.images import Drawn, open_image, size_of
from train.evaluate.statistics import cluster_bootstrap, krippendorff_alpha, sign_test
from train.files import read_json, write_atomically, write_folder, write_json

TEMPLATE = Path(__file__).with_name("human.html")
FORMAT = "image-comparison-1"
EQUAL = "equal"
QUESTIONS = {"quality": "Visual Quality", "alignment": "Text Alignment"}
ALL = "All"
SHORT = 200  # characters of ids and names in answers


def make_page(
    first: Sequence[Drawn],
    second: Sequence[Drawn],
    out: Path,
    names: tuple[str, str],
    *,
    title: str = "Image comparison",
    per_domain: int | None = None,
    embed: bool = False,
) -> Path:
    """Write OUT/index.html with OUT/images (embed: with the images inside it) and OUT-key.json; returns the key's path.

    Pairs are images of the same name in both; per_domain: only so many of each domain, spread over the set. Images are
    written anew: a PNG may hold the graph that made it. ValueError where nothing pairs up or prompts or sizes differ.
    """
    if names[0] == names[1]:
        raise ValueError(f"both models are called {names[0]!r}; name them apart")
    path = out.with_name(f"{out.name}-key.json")
    for there in (out, path):
        if there.exists():
            raise FileExistsError(f"{there} is there: a study is not overwritten; name another --out")
    pairs = _chosen(_pairs(first, second), per_domain)
    secret = secrets.token_hex(16)
    study = {"format": FORMAT, "study": _hidden(secret, "study", "")[:10]}
    key = {**study, "names": list(names), "pairs": _key_pairs(secret, pairs)}
    files = {name: image.path for pair in pairs for name, image in zip(_ids(secret, pair), pair, strict=True)}

    def write(folder: Path) -> None:
        page = {**study, "title": title, "pairs": _page_pairs(key), "sources": _sources(folder, files, embed)}
        inside = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
        html = TEMPLATE.read_text(encoding="utf-8").replace("__STUDY__", inside)
        (folder / "index.html").write_text(html, encoding="utf-8")

    write_folder(out, write)
    return write_json(path, key)


def _key_pairs(secret: str, pairs: Iterable[tuple[Drawn, Drawn]]) -> dict[str, Any]:
    """The pairs as the key has them: `images` are the first model's and the second's."""
    found = {}
    for pair in pairs:
        prompt, name = pair[0].prompt, pair[0].name
        entry = {"images": _ids(secret, pair), "prompt": prompt.text, "domain": prompt.domain, "name": name}
        found[_hidden(secret, "pair", name)] = entry
    return found


def _page_pairs(key: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs as the page has them: in an order that says nothing, pairs as well as images."""
    return [
        {"id": number, "prompt": pair["prompt"], "images": sorted(pair["images"])}
        for number, pair in sorted(key["pairs"].items())
    ]


def _sources(folder: Path, files: Mapping[str, Path], embed: bool) -> dict[str, str]:
    """Where the page finds each image: its data, or a file that is written to folder/images."""
    found = {}
    for name, path in sorted(files.items()):
        data = _png(open_image(path))
        if embed:
            found[name] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            continue
        file = folder / "images" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        found[name] = f"images/{file.name}"
    return found


def _ids(secret: str, pair: tuple[Drawn, Drawn]) -> list[str]:
    return [_hidden(secret, side, image.name) for side, image in zip("AB", pair, strict=True)]


def _pairs(first: Sequence[Drawn], second: Sequence[Drawn]) -> list[tuple[Drawn, Drawn]]:
    """Images of the same name, in the order of the first; checked to be of one prompt and one size."""
    others = {image.name: image for image in second}
    pairs = [(image, others[image.name]) for image in first if image.name in others]
    if not pairs:
        raise ValueError(
            f"no image of {first[0].path.parent} has the name of one in {second[0].path.parent}: pairs are files of "
            "the same name"
        )
    for one, other in pairs:
        if one.prompt.text != other.prompt.text:
            raise ValueError(f"{one.path} and {other.path} were made from different prompts")
        sizes = ["x".join(map(str, reversed(size_of(image.path)))) for image in (one, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{one.path} is {sizes[0]} and {other.path} {sizes[1]} pixels: the size would say which model it is; "
                "draw both at one size"
            )
    return pairs


def _chosen(pairs: list[tuple[Drawn, Drawn]], per_domain: int | None) -> list[tuple[Drawn, Drawn]]:
    if per_domain is None:
        return pairs
    domains: dict[str, list[tuple[Drawn, Drawn]]] = defaultdict(list)
    for pair in pairs:
        domains[pair[0].prompt.domain].append(pair)
    for domain, found in domains.items():
        if len(found) < per_domain:
            raise ValueError(f"{per_domain} pairs of domain {domain!r} are wanted, there are {len(found)}")
    return [found[k * len(found) // per_domain] for found in domains.values() for k in range(per_domain)]


def _hidden(secret: str, kind: str, name: str) -> str:
    return hashlib.sha256(f"{secret}/{kind}/{name}".encode()).hexdigest()[:16]


def _png(image: Image.Image) -> bytes:
    """The pixels alone, without the metadata of the file they came from."""
    bare, buffer = Image.new("RGB", image.size), io.BytesIO()
    bare.paste(image)
    bare.save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Answer:
    """One rater's answers about one pair: "A", "B" or "=" for each question."""

    rater: str
    pair: str
    domain: str
    choices: dict[str, str]


def read_answers(key: dict[str, Any], paths: Iterable[Path]) -> tuple[list[Answer], list[str]]:
    """Answers of files and folders of files, and remarks on them.

    Of one session's files the one saved last counts. A file of another study, of an unknown pair or image, or by a
    rater of whom there is another session is a ValueError that names it.
    """
    sessions: dict[str, tuple[Path, dict[str, Any]]] = {}
    remarks = []
    for path in _files(paths):
        record = _record(path, key)
        there = sessions.get(record["session"])
        if there is not None:
            older = min((there, (path, record)), key=lambda entry: entry[1]["saved"])[0]
            remarks.append(f"{older} is left out: {record['rater']} saved the same session again later")
        if there is None or record["saved"] > there[1]["saved"]:
            sessions[record["session"]] = (path, record)
    raters: dict[str, Path] = {}
    answers: list[Answer] = []
    for path, record in sessions.values():
        rater = record["rater"]
        if rater in raters:
            raise ValueError(
                f"{path} and {raters[rater]} are two sessions of rater {rater!r}; keep one, or rename a rater"
            )
        raters[rater] = path
        answers += _answers(path, record, key)
        if len(record["answers"]) < len(key["pairs"]):
            remarks.append(f"{path}: {rater} answered {len(record['answers'])} of {len(key['pairs'])} pairs")
    return answers, remarks


def _files(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there are no answers")
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not found:
        raise FileNotFoundError(f"no .json file in {', '.join(map(str, paths))}")
    return found


def _record(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    short = text(SHORT)
    fields = dict.fromkeys(("format", "study", "rater", "session", "saved"), short)
    record = read_json(path)
    with naming(path):
        limit = max(1, len(key["pairs"]))
        check_fields(record, {**fields, "answers": items(mapping, 0, limit)}, needed=(*fields, "answers"))
        if (record["format"], record["study"]) != (key["format"], key["study"]):
            raise ValueError(f"answers of study {record['study']!r}, the key is of {key['study']!r}")
    return record


def _answers(path: Path, record: dict[str, Any], key: dict[str, Any]) -> list[Answer]:
    found, seen = [], set()
    with naming(path):
        for entry in record["answers"]:
            fields = {name: text(SHORT) for name in ("pair", *QUESTIONS)}
            check_fields(entry, fields, needed=tuple(fields))
            pair = key["pairs"].get(entry["pair"])
            if pair is None or entry["pair"] in seen:
                raise ValueError(f"pair {entry['pair']!r} is not of this study, or is answered twice")
            seen.add(entry["pair"])
            meaning = {pair["images"][0]: "A", pair["images"][1]: "B", EQUAL: "="}
            unknown = [entry[question] for question in QUESTIONS if entry[question] not in meaning]
            if unknown:
                raise ValueError(f"pair {entry['pair']!r}: {unknown[0]!r} is neither of its images nor {EQUAL!r}")
            choices = {question: meaning[entry[question]] for question in QUESTIONS}
            found.append(Answer(record["rater"], entry["pair"], pair["domain"], choices))
    return found


def read_key(path: Path) -> dict[str, Any]:
    """The key file of a study."""
    key = read_json(path)
    with naming(path):
        short = text(SHORT)
        fields = {"format": short, "study": short, "names": items(short, 2, 2), "pairs": mapping}
        check_fields(key, fields, needed=tuple(fields))
        if key["format"] != FORMAT:
            raise ValueError(f"format is {key['format']!r}, expected {FORMAT!r}: name the study's -key.json")
        for pair in key["pairs"].values():
            check_fields({"pair": pair}, {"pair": mapping})
            check_fields(pair, {"images": items(short, 2, 2), "domain": text(1000)}, needed=("images", "domain"))
    return key


def analyse(key: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """Table 4's rows: for each domain, All last, and each question the shares of A, B and equal with their intervals.

    Intervals are bootstraps over prompts, `lead` is A's share less B's. The sign test over prompts takes for each
    prompt which model got more answers; that over answers takes every answer as independent, which answers to one
    prompt are not, so it is the weaker evidence. alpha is Krippendorff's over A, B and equal.
    """
    if not answers:
        raise ValueError("no answer was given")
    domains = sorted({pair["domain"] for pair in key["pairs"].values()} & {answer.domain for answer in answers})
    rows = {}
    for domain in [*(domains if domains != [""] else []), ALL]:
        chosen = [answer for answer in answers if domain in (ALL, answer.domain)]
        rows[domain] = {question: _question(question, chosen) for question in QUESTIONS}
    return {
        "study": key["study"],
        "names": key["names"],
        "pairs": len(key["pairs"]),
        "raters": len({answer.rater for answer in answers}),
        "answers": len(answers),
        "rows": rows,
    }


def _question(question: str, answers: Sequence[Answer]) -> dict[str, Any]:
    choices = [answer.choices[question] for answer in answers]
    prompts = [answer.pair for answer in answers]
    found: dict[str, Any] = {
        name: cluster_bootstrap([choice == letter for choice in choices], prompts).as_dict()
        for name, letter in (("first", "A"), ("second", "B"), (EQUAL, "="))
    }
    points = [(choice == "A") - (choice == "B") for choice in choices]
    found["lead"] = cluster_bootstrap(points, prompts).as_dict()
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for prompt, choice in zip(prompts, choices, strict=True):
        by_prompt[prompt].append(choice)
    leads = [units.count("A") - units.count("B") for units in by_prompt.values()]
    found["sign_test"] = {
        "prompts": sign_test(sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)),
        "answers": sign_test(choices.count("A"), choices.count("B")),
    }
    alpha = krippendorff_alpha(list(by_prompt.values()))
    found["alpha"] = alpha if math.isfinite(alpha) else None
    return found


def table(results: dict[str, Any]) -> str:
    """The analysis as Markdown, in the columns of Table 4 and those that say how sure they are."""
    first, second = results["names"]
    lines = [
        f"{results['raters']} raters, {results['pairs']} pairs, {results['answers']} answers to each question; "
        "95 % intervals over prompts",
        "",
    ]
    for question, title in QUESTIONS.items():
        columns = (f"{first} is better", f"{second} is better", "Equal", "lead", "p (prompts)", "p (answers)", "alpha")
        lines += [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for domain, row in results["rows"].items():
            found = row[question]
            cells = [_share(found[name]) for name in ("first", "second", EQUAL, "lead")]
            cells += [f"{found['sign_test'][name]:.3g}" for name in ("prompts", "answers")]
            cells.append("" if found["alpha"] is None else f"{found['alpha']:.2f}")
            lines.append(f"| {domain} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _share(estimate: dict[str, Any]) -> str:
    interval = "" if estimate["low"] is None else f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"
    return f"{100 * estimate['value']:.1f}%{interval}"


def write_table(path: Path, results: dict[str, Any]) -> None:
    """The analysis as PATH.json, and its table as PATH.md beside it."""
    write_json(path.with_suffix(".json"), results)
    words = table(results)
    write_atomically(path.with_suffix(".md"), lambda temporary: temporary.write_text(words, encoding="utf-8"))
