"""`python -m train.evaluate TABLE [--metric NAME] [--dry-run] [a.b=value ...]`, and `... human page|analyse`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train.evaluate import human
from train.evaluate.check import plan
from train.evaluate.images import read_folder
from train.evaluate.metrics import METRICS
from train.evaluate.prompts import PromptSet
from train.evaluate.run import evaluate
from train.evaluate.spec import list_tables, load_evaluation
from train.evaluate.table import table
from train.run import exit_code

KINDS = {".txt": "text", ".tsv": "partiprompts", ".jsonl": "jsonl", ".json": "mjhq-30k"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code, as train.run does."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["human"]:
        options = _human_parser().parse_args(given[1:])
        return exit_code(lambda: _page(options) if options.command == "page" else _analyse(options))
    options = _parser().parse_intermixed_args(given)
    if options.list:
        for name in list_tables():
            print(f"{name:12} {load_evaluation(name).about}")
        return 0
    if not options.table:
        print("name a table, or use --list", file=sys.stderr)
        return 1
    return exit_code(lambda: _evaluate(options, ["python", "-m", "train.evaluate", *given]))


def _evaluate(options: argparse.Namespace, command: Sequence[str]) -> int:
    evaluation = load_evaluation(options.table, options.overrides)
    if options.dry_run:
        lines, problems = plan(evaluation, options.metric)
        print("\n".join([*lines, *(f"  missing: {problem}" for problem in problems)]))
        return int(bool(problems))
    results = evaluate(evaluation, options.metric, command)
    if results:
        print(f"\n{table(results)}\n\n{evaluation.folder / 'report.html'}")
    return 0


def _page(options: argparse.Namespace) -> int:
    prompts = []
    if options.prompts:
        kind = KINDS.get(options.prompts.suffix)
        if kind is None:
            raise ValueError(f"{options.prompts}: --prompts is a file that ends in {', '.join(KINDS)}")
        prompts = PromptSet(kind=kind, path=str(options.prompts)).read()  # type: ignore[arg-type]
    first, second = (read_folder(folder, prompts) for folder in (options.first, options.second))
    names = options.names or (_name(options.first), _name(options.second))
    key = human.make_page(
        first,
        second,
        options.out,
        (names[0], names[1]),
        title=options.title,
        per_domain=options.per_domain,
        embed=options.embed,
    )
    print(f"{options.out / 'index.html'}: open it, or put the folder {options.out} on any web server")
    print(f"{key}: says which image is whose; keep it to yourself")
    return 0


def _name(folder: Path) -> str:
    """A model's name from the folder of its images."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "images" else folder.name


def _analyse(options: argparse.Namespace) -> int:
    key = human.read_key(options.key)
    answers, remarks = human.read_answers(key, options.answers)
    results = human.analyse(key, answers)
    print("\n".join([human.table(results), *remarks]))
    if options.out:
        human.write_table(options.out, {**results, "remarks": remarks})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Draw images, measure them, write a table; what is done is skipped. See docs/evaluation.md.",
        epilog="python -m train.evaluate human page|analyse -h: the human evaluation",
    )
    parser.add_argument("table", nargs="?", help="a name in train/evaluate/tables, or a path to a .yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="e.g. models.base.base=FOLDER or prompts.first=50"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help=f"only this of {', '.join(METRICS)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what is missing")
    parser.add_argument("--list", action="store_true", help="show the tables")
    return parser


def _human_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate human", description=human.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="make the page from two folders of images")
    page.add_argument("first", type=Path, help="folder of images, as an evaluation draws them (MODEL/images), or any")
    page.add_argument("second", type=Path)
    page.add_argument("--out", type=Path, required=True, help="folder of the page; the key goes to OUT-key.json")
    page.add_argument("--names", nargs=2, metavar=("FIRST", "SECOND"), help="default: the folders' names")
    page.add_argument("--prompts", type=Path, help="prompts of folders without index.json, in the order of the images")
    page.add_argument("--per-domain", type=int, help="pairs of each domain (the paper: 25); default all")
    page.add_argument("--title", default="Image comparison")
    page.add_argument("--embed", action="store_true", help="one file with the images inside")
    analyse = commands.add_parser("analyse", help="Table 4 from the answers")
    analyse.add_argument("key", type=Path, help="OUT-key.json")
    analyse.add_argument("answers", type=Path, nargs="+", help="answer files, or folders of them")
    analyse.add_argument("--out", type=Path, help="also write this .json, and the table as .md beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
