"""Which ComfyUIs are found, in which modes they run, and that what is tested is what the summary says."""

import itertools
import os
import sys

import pytest


@pytest.fixture
def settings():
    return sys.modules["comfy_tests_settings"]


def comfyui(folder, version, dynamic=False):
    """Just enough of a ComfyUI to be found."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "model_patcher.py").touch()
    (folder / "comfyui_version.py").write_text(f'# a comment\n__version__ = "{version}"\n')
    if dynamic:
        (folder / "comfy" / "memory_management.py").write_text("aimdo_enabled = False\n")
    return folder


def test_all_in_the_usual_places_are_found_once(tmp_path, settings):
    home, pack = tmp_path / "home", tmp_path / "installed" / "custom_nodes" / "pack"
    wanted = [comfyui(tmp_path / "installed", "1.0")]
    wanted += [comfyui(home / name, "1.0") for name in ("ComfyUI", "ComfyUI-a", "ComfyUI-b", "comfy/ComfyUI")]
    (home / "ComfyUI-again").symlink_to(home / "ComfyUI")
    (home / "ComfyUI-no").mkdir()
    assert settings.find_comfyuis(None, pack, home) == wanted
    assert settings.find_comfyuis("", pack, home) == wanted


def test_comfyui_path_lists_those_that_are_used(tmp_path, settings):
    one, other = comfyui(tmp_path / "one", "1.0"), comfyui(tmp_path / "other", "1.0")
    comfyui(tmp_path / "ComfyUI", "1.0")
    named = os.pathsep.join((str(other), str(one), str(other)))
    assert settings.find_comfyuis(named, home=tmp_path) == [other, one]
    with pytest.raises(ValueError, match=r"COMFYUI_PATH names .*missing"):
        settings.find_comfyuis(os.pathsep.join((str(one), str(tmp_path / "missing"))))


def test_modes_and_labels(tmp_path, settings):
    old, new = comfyui(tmp_path / "old", "0.8.0"), comfyui(tmp_path / "new", "0.33.0", dynamic=True)
    twin = comfyui(tmp_path / "twin", "0.33.0", dynamic=True)
    labels = [setting.label for setting in settings.settings_of([old, new])]
    assert labels == ["0.8.0-legacy", "0.33.0-legacy", "0.33.0-dynamic"]
    assert len({setting.label for setting in settings.settings_of([old, new, twin])}) == 5


def test_one_setting_after_the_other(request, comfy):
    """pytest brings together the tests of a setting, so that one server at a time is enough."""
    order = [item.callspec.params["comfy"] for item in request.session.items if "comfy" in item.fixturenames]
    runs = [setting for setting, _ in itertools.groupby(order)]
    assert len(runs) == len(set(order))
    assert comfy.setting in runs


def test_mode_of_the_server(server, comfy):
    assert server.get("/system_stats")["system"]["comfyui_version"] == comfy.version
    assert ("dynamic VRAM on the CPU" in server.log()) == (comfy.mode == "dynamic")


def test_mode_of_the_models(comfy, tmp_path, base_release):
    _, found = comfy.run("modes:dynamic", tmp_path, params={"release": str(base_release[0])})
    assert found["is_dynamic"] == (comfy.mode == "dynamic")
    assert (found["ranged"] > 20) == (comfy.mode == "dynamic"), "layers are small: the simulation must not skip them"


def test_a_process_does_jobs_until_one_has_replaced_something_of_core(comfy, tmp_path):
    (_, one), (_, two) = (comfy.run("modes:process", tmp_path) for _ in range(2))
    assert one == two
    comfy.run("modes:tampering", tmp_path)
    _, three = comfy.run("modes:process", tmp_path)
    assert three["pid"] != one["pid"]
    assert three["free"] == "comfy.model_management"
    _, fresh = comfy.run("modes:process", tmp_path, alone=True)
    assert fresh["pid"] not in (one["pid"], three["pid"])
    assert comfy.run("modes:process", tmp_path)[1]["pid"] == three["pid"]


def test_a_failing_job_says_why_and_harms_no_other(comfy, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)modes:failing failed inside.*ArithmeticError: of course"):
        comfy.run("modes:failing", tmp_path, params={"what": "course"})
    comfy.run("modes:process", tmp_path)
