"""Tests in two processes (`pytest -n auto`, by pytest-xdist), and a summary for each ComfyUI.

What shares costly fixtures stays together in one process: the tests of one ComfyUI in one mode, else those of one file.
Without `-n` tests run as if this were not here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

MOST = 2  # processes; each may hold a ComfyUI, a browser and a large autoencoder
# What is begun first after the ComfyUIs, the longest first, so that the processes are done at the same time.
LONG = ("toy/test_result", "dcae/test_dcae_streaming", "dcae/test_dcae_real_widths", "toy/test_sana")
LONG += ("train/test_resume", "dcae/test_dcae_files")
SETTING = "ComfyUI"  # a property of reports: the ComfyUI and mode that a test ran in


def _settings():
    """comfy/settings.py, under the name by which comfy/conftest.py finds it too."""
    name = "comfy_tests_settings"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "comfy" / "settings.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def labels() -> list[str]:
    """Those of all settings; a test that runs in one bears its label in its name."""
    settings = _settings()
    try:
        found = settings.find_comfyuis(os.environ.get("COMFYUI_PATH"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    return [setting.label for setting in settings.settings_of(found)]


def group_of(nodeid: str, labels: list[str]) -> str:
    """What a test must share a process with: a setting's label, or a file."""
    file, _, name = nodeid.partition("::")
    return next((label for label in labels if label in name), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: no other process than this one on a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores) if cores > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list) -> None:
    """One thread of torch's in each of several processes: more than there are cores wait for each other."""
    if len(specs) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hand out whole groups, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    known = labels()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid, known)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In processes of xdist, the longest groups first: the settings, then LONG, then by the number of tests."""
    if not hasattr(config, "workerinput"):
        return
    known = labels()
    groups = {item: group_of(item.nodeid, known) for item in items}
    sizes = Counter(groups.values())
    long = [f"tests/{name}.py" for name in LONG]

    def rank(item: pytest.Item) -> tuple:
        group = groups[item]
        return group not in known, long.index(group) if group in long else len(long), -sizes[group], group

    items.sort(key=rank)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Reports name the setting: where xdist runs the tests, the summary has nothing but reports."""
    setting = getattr(item, "callspec", None) and item.callspec.params.get("comfy")
    if setting is not None:
        item.user_properties.append((SETTING, f"{setting.label.removesuffix(f'-{setting.mode}')} {setting.mode}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each setting: "ComfyUI 0.33.0 dynamic: 187 passed, 2 failed in 93 s"."""
    counts: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if not hasattr(report, "duration"):  # what was deselected is here too
                continue
            setting = dict(getattr(report, "user_properties", ())).get(SETTING)
            if setting:
                seconds[setting] += report.duration
                counts.setdefault(setting, Counter())[outcome] += bool(outcome)  # "": setups, teardowns that went well
    if counts:
        terminalreporter.section(SETTING)
    for setting, found in sorted(counts.items()):
        said = ", ".join(f"{number} {outcome}" for outcome, number in found.items() if number)
        terminalreporter.write_line(f"{SETTING} {setting}: {said or 'nothing ran'} in {seconds[setting]:.0f} s")
