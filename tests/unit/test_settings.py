"""What users may write into XDIT_* variables, and what they are told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.planning.strategy import AUTO, NAMES, Strategy, parse_strategy
from comfy_xdit_patch.settings import (
    AskedDevices,
    cache_directory,
    given,
    parse_gpus,
    read_settings,
    unknown_names,
    written,
)
from comfy_xdit_patch.variables import VARIABLES


def test_without_variables_all_gpus_are_used_and_the_strategy_is_chosen():
    settings = read_settings({})
    assert settings.gpus == AskedDevices("all")
    assert settings.strategy == AUTO
    assert not settings.strict
    assert (settings.start_timeout_s, settings.step_timeout_s) == (180, 600)
    assert settings.cpu_threads == 1
    assert (settings.gpu_memory_bytes, settings.idle_timeout_s) == (None, None)
    assert not settings.is_off


def test_the_documented_defaults_are_the_defaults():
    assert read_settings({v.name: v.default for v in VARIABLES}) == read_settings({})


def test_an_empty_value_means_the_default():
    assert read_settings({v.name: "  " for v in VARIABLES}) == read_settings({})


def test_settings_are_written_as_a_user_writes_them():
    assert written(read_settings({})) == {v.name: v.default for v in VARIABLES}
    assert given({"XDIT_GPUS": "seven"})["XDIT_GPUS"] == "seven"
    assert given({}) == {v.name: v.default for v in VARIABLES}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("XDIT_GPUS", text) for text in ("0", "2", "2,", "0,3", "cpu:3", "GPU-1a2b,GPU-3c4d")),
        *(("XDIT_STRATEGY", text) for text in ("off", "ring", "batch=2,ulysses=2", "usp")),
        *(("XDIT_STRATEGY", text) for text in ("ulysses=2,fsdp=2", "ulysses=4,modulation=4")),
        *(("XDIT_GPU_MEMORY", text) for text in ("24", "23.5")),
        ("XDIT_STRICT", "1"),
        ("XDIT_START", "first"),
        ("XDIT_STEP_TIMEOUT", "0.5"),
        *(("XDIT_IDLE_TIMEOUT", text) for text in ("900", "0.5")),
        ("XDIT_LOG_DIR", "/var/log/xdit"),
        ("XDIT_STATUS", "all"),
        ("XDIT_VAE", "off"),
        *(("XDIT_TRANSFER_DTYPE", text) for text in ("int8", "fp8")),
    ],
)
def test_what_is_written_is_read_as_the_same(name, value):
    settings = read_settings({name: value})
    assert written(settings)[name] == value
    assert read_settings(written(settings)) == settings


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch):
    monkeypatch.setenv("XDIT_CPU_THREADS", "3")
    assert read_settings().cpu_threads == 3
    assert read_settings({}).cpu_threads == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", AskedDevices("all")),
        (" ALL ", AskedDevices("all")),
        ("4", AskedDevices("count", count=4)),
        ("0", AskedDevices("off")),
        ("0,2,3", AskedDevices("indices", indices=(0, 2, 3))),
        ("2, 0", AskedDevices("indices", indices=(2, 0))),
        ("3,", AskedDevices("indices", indices=(3,))),  # one GPU by index needs the comma
        ("cpu:2", AskedDevices("cpu", count=2)),
        ("CPU:12", AskedDevices("cpu", count=12)),
        ("GPU-1a2b,GPU-3c4d-5e", AskedDevices("uuids", uuids=("GPU-1a2b", "GPU-3c4d-5e"))),
    ],
)
def test_gpus_can_be_named_in_these_ways(text, expected):
    assert parse_gpus(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("-1", "1.5", "two", ",", "0,,1", "all,0", "1000", "cuda:0"),
        *("0,1,0", "0,00", "GPU-1a2b,GPU-1A2B"),  # one GPU named twice
        *("cpu", "cpu:0", "cpu:-1", "cpu:x"),
        *("0,GPU-1a2b", "GPU-", "GPU-xyz!", "MIG-00aa11bb"),
    ],
)
def test_other_ways_to_name_gpus_are_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XDIT_GPUS", "cpu:0"),
        ("XDIT_STRATEGY", "ulises"),
        ("XDIT_STRATEGY", "ulysses=2;ring=2"),
        ("XDIT_STRICT", "yes"),
        ("XDIT_START_TIMEOUT", "0"),
        ("XDIT_START_TIMEOUT", "nan"),
        ("XDIT_STEP_TIMEOUT", "inf"),
        ("XDIT_STEP_TIMEOUT", "-5"),
        ("XDIT_STEP_TIMEOUT", "ten"),
        *(("XDIT_IDLE_TIMEOUT", text) for text in ("0", "never", "inf", "10 min")),
        ("XDIT_GPU_MEMORY", "0"),
        ("XDIT_GPU_MEMORY", "24GB"),
        ("XDIT_GPU_MEMORY", "inf"),
        ("XDIT_CPU_THREADS", "0"),
        ("XDIT_CPU_THREADS", "1.5"),
    ],
)
def test_a_bad_value_is_reported_with_variable_value_and_legal_values(name, value):
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    legal = next(v.legal for v in VARIABLES if v.name == name)
    assert str(caught.value) == f'{name}="{value}" is not legal. Legal: {legal}.'


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_can_be_named(name):
    assert read_settings({"XDIT_STRATEGY": f" {name.upper()} "}).strategy == Strategy(name)
    assert str(Strategy(name)) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cfg", "batch"),
        ("ulysses=2,ring=2,batch=2", "batch=2,ulysses=2,ring=2"),
        ("cfg=2, RING = 3", "batch=2,ring=3"),
        ("ring=4", "ring=4"),
        ("ulysses=1,batch=2", "batch=2"),
        ("ring=1", "ulysses=1"),
        ("tensor=2,cfg=2", "batch=2,tensor=2"),
        ("fsdp=4,ulysses=4", "ulysses=4,fsdp=4"),
        ("fsdp=2", "ulysses=2,fsdp=2"),
        ("fsdp=1", "fsdp=1"),
        ("modulation=2", "ulysses=2,modulation=2"),
        ("ring=2,modulation=2", "ring=2,modulation=2"),
    ],
)
def test_a_plan_is_written_in_any_order_and_read_back_in_one(text, expected):
    strategy = parse_strategy(text)
    assert str(strategy) == expected
    assert parse_strategy(expected) == strategy


@pytest.mark.parametrize(
    "text",
    [
        *("ulises", "ring=0", "ring=-2", "ring=2.0", "ring=", "=2", "ring=2,", "stages=2", "4"),
        *("auto=2", "usp=4", "ring=2,ring=2", "cfg=2,batch=2", "auto,ring=2", "ring=1000"),
    ],
)
def test_other_ways_to_write_a_strategy_are_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_strategy(text)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("auto", None), ("AUTO", None), ("24", 24 << 30), ("0.5", 1 << 29)]
)
def test_memory_of_a_card_is_in_gib(text, num_bytes):
    assert read_settings({"XDIT_GPU_MEMORY": text}).gpu_memory_bytes == num_bytes


def test_what_is_given_stands_in_the_place_of_the_environments_value_and_that_of_the_default(
    monkeypatch,
):
    monkeypatch.setenv("XDIT_STRATEGY", " ring ")
    monkeypatch.setenv("XDIT_GPUS", "cpu:2")
    values = given({"XDIT_GPUS": "cpu:3", "XDIT_STRATEGY": ""})
    assert values.keys() == {v.name for v in VARIABLES}
    found = [values[name] for name in ("XDIT_GPUS", "XDIT_STRATEGY", "XDIT_BALANCE")]
    assert found == ["cpu:3", "ring", "adaptive"]
    assert read_settings(values) == read_settings({"XDIT_STRATEGY": "ring", "XDIT_GPUS": "cpu:3"})


def test_a_misspelt_name_is_reported_and_does_not_silently_mean_the_default():
    hints = unknown_names({"XDIT_GPU": "2", "XDIT_GPUS": "2", "PATH": ""})
    assert hints == {"XDIT_GPU": "Did you mean XDIT_GPUS?"}
    assert read_settings({"XDIT_GPU": "2"}) == read_settings({}), "and nothing is switched off"


def test_a_name_that_is_like_none_is_told_all_of_them():
    hint = unknown_names({"XDIT_A_LONG_WAY_FROM_ALL": ""})["XDIT_A_LONG_WAY_FROM_ALL"]
    assert all(variable.name in hint for variable in VARIABLES)


def test_a_variable_of_xfusers_own_is_nobodys_error():
    assert unknown_names({"XDIT_LOGGING_LEVEL": "WARNING"}) == {}


def test_a_folder_for_logs_is_named_by_an_absolute_path(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert read_settings({"XDIT_LOG_DIR": "/var/log/x"}).log_dir == Path("/var/log/x")
    assert read_settings({"XDIT_LOG_DIR": "~/logs"}).log_dir == Path("/h/logs")
    assert read_settings({}).log_dir is None
    with pytest.raises(SettingsError, match=r'^XDIT_LOG_DIR="logs" is not legal.*absolute'):
        read_settings({"XDIT_LOG_DIR": "logs"})


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_directory({}) is None
    assert cache_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/comfy-xdit-patch")


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_variables_of_other_programs_are_left_alone():
    assert read_settings({"CUDA_VISIBLE_DEVICES": "x", "MY_XDIT_GPU": "y"}) == read_settings({})


@pytest.mark.parametrize(
    ("environ", "is_off"),
    [
        ({"XDIT_STRATEGY": "off"}, True),
        ({"XDIT_STRATEGY": "OFF"}, True),
        ({"XDIT_GPUS": "0"}, True),
        ({"XDIT_GPUS": "1"}, False),
        ({"XDIT_STRATEGY": "ulysses"}, False),
    ],
)
def test_two_settings_switch_the_package_off(environ, is_off):
    assert read_settings(environ).is_off is is_off
