"""Readers of prompt sets, on small files in the published formats."""

import json

import pytest

from train.evaluate.prompts import PromptSet


def read(path, kind, **more):
    return PromptSet(kind=kind, path=str(path), **more).read()


def test_the_sample_has_twenty_prompts_in_the_papers_three_domains():
    prompts = PromptSet().read()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 20
    assert {prompt.domain for prompt in prompts} == {"general", "person", "anime"}


def test_each_format_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert [p.text for p in read(tmp_path / "a.txt", "text")] == ["one", "two"]

    mjhq = {"0a": {"category": "people", "prompt": "a man"}, "1b": {"category": "food", "prompt": "ein Bäcker"}}
    (tmp_path / "meta_data.json").write_text(json.dumps(mjhq), encoding="utf-8")
    found = read(tmp_path / "meta_data.json", "mjhq-30k")
    assert [(p.text, p.domain, p.record["id"]) for p in found] == [
        ("a man", "people", "0a"),
        ("ein Bäcker", "food", "1b"),
    ]

    line = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (prompt,) = read(tmp_path / "evaluation_metadata.jsonl", "geneval")
    assert (prompt.text, prompt.domain, prompt.record) == ("two dogs", "counting", line)

    parti = 'Prompt\tCategory\tChallenge\tNote\na sign that says "OK"\tArtifacts\tBasic\t\n'
    (tmp_path / "PartiPrompts.tsv").write_text(parti, encoding="utf-8")
    (prompt,) = read(tmp_path / "PartiPrompts.tsv", "partiprompts")
    assert (prompt.text, prompt.domain) == ('a sign that says "OK"', "Artifacts")

    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a lake"}\n', encoding="utf-8")
    (prompt,) = read(tmp_path / "metadata.jsonl", "aesthetic-4k")
    assert (prompt.text, prompt.record["file_name"]) == ("a lake", "0.png")


def test_classes_come_in_turns_and_a_part_is_spread_over_the_set(tmp_path):
    prompts = PromptSet(kind="classes", classes=3, per_class=2).read()
    assert [p.text for p in prompts] == ["0", "1", "2", "0", "1", "2"]
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(10))), encoding="utf-8")
    assert [p.text for p in read(tmp_path / "a.txt", "text", first=5)] == ["0", "2", "4", "6", "8"]
    assert [p.text for p in read(tmp_path / "a.txt", "text", first=2, spread=False)] == ["0", "1"]


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("mjhq-30k", '{"0a": "a man"}', "0a: is 'a man', expected an object with `prompt`"),
        ("geneval", '{"prompt": "two dogs"}', "entry 1: no `tag`"),
        ("partiprompts", "a\tb\n", "columns are .*expected Prompt"),
        ("jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', r"line 2: no prompt, caption or text.*promt"),
        ("text", "\n", "holds no prompt"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path, kind, content, said):
    path = tmp_path / "prompts"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as refused:
        read(path, kind)
    assert str(path) in str(refused.value)
    with pytest.raises(FileNotFoundError, match=r"docs/evaluation\.md"):
        read(tmp_path / "nowhere", kind)
