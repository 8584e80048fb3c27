"""Which file a model came from."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from comfy_xdit_patch.host.reading.models import ModelRegistry
from comfy_xdit_patch.wire.files import file_identity


def now(file):
    return file_identity(str(file))


class BaseModel(torch.nn.Module):
    """Stands for ComfyUI's class of that name."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_model_is_found_with_loader_file_and_options(file):
    registry, model = ModelRegistry(), BaseModel()
    options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True, "n": None}
    registry.remember(model, "load_diffusion_model", str(file), options, file=now(file))
    source = registry.find(model).source
    assert (source.loader, source.path) == ("load_diffusion_model", str(file))
    assert source.options == {"dtype": "torch.float8_e4m3fn", "fp8_optimizations": True, "n": None}
    assert source.file == file_identity(str(file))


@pytest.mark.parametrize(
    ("compute", "dtypes"),
    [
        (torch.bfloat16, ["torch.float8_e4m3fn", "torch.bfloat16"]),
        (None, ["torch.float8_e4m3fn", ""]),
    ],
)
def test_what_comfyui_chose_for_its_card_is_noted_for_workers_on_others(file, compute, dtypes):
    registry, model = ModelRegistry(), BaseModel()
    model.get_dtype = lambda: torch.float8_e4m3fn
    model.manual_cast_dtype = compute
    registry.remember(model, "load_diffusion_model", str(file), {}, file=now(file))
    assert registry.find(model).source.dtypes == dtypes


def test_a_relative_path_is_made_absolute_for_the_workers(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    registry, model = ModelRegistry(), BaseModel()
    registry.remember(model, "load_diffusion_model", file.name, {}, file=now(file))
    assert registry.find(model).source.path == str(file)


def test_a_model_that_was_not_seen_being_loaded_has_a_number_and_no_file():
    registry, one, other = ModelRegistry(), BaseModel(), BaseModel()
    found = registry.find(one)
    assert found.source is None
    assert registry.find(one) == found, "it keeps its number"
    assert registry.find(other).number != found.number


def test_equal_looking_models_are_told_apart(file):
    registry, one, other = ModelRegistry(), BaseModel(), BaseModel()
    registry.remember(one, "load_diffusion_model", str(file), {}, file=now(file))
    registry.remember(other, "load_diffusion_model", str(file), {}, file=now(file))
    assert registry.find(one).number != registry.find(other).number


@pytest.mark.parametrize("value", [object(), torch.nn.Linear, [1], lambda: None])
def test_a_model_loaded_with_options_that_a_message_cannot_carry_has_no_file(file, value):
    registry, model = ModelRegistry(), BaseModel()
    options = {"dtype": torch.float32, "custom_operations": value}
    registry.remember(model, "load_diffusion_model", str(file), options, file=now(file))
    assert registry.find(model).source is None


def test_a_model_that_changed_gets_a_new_number_and_the_old_one_is_gone(file):
    registry, model = ModelRegistry(), BaseModel()
    registry.remember(model, "load_diffusion_model", str(file), {}, file=now(file))
    old = registry.find(model)
    new = registry.renumber_without_file(model)
    assert new.number != old.number
    assert new.source is None
    assert registry.find(model) == new
    assert registry.take_gone() == [old.number]
    assert registry.take_gone() == []


def test_the_number_of_a_model_that_ended_is_given_back_once(file):
    registry, model = ModelRegistry(), BaseModel()
    registry.remember(model, "load_diffusion_model", str(file), {}, file=now(file))
    number = registry.find(model).number
    assert registry.take_gone() == []
    del model
    gc.collect()
    assert registry.take_gone() == [number]
    assert registry.take_gone() == []


def test_the_callers_options_are_not_changed(file):
    options = {"dtype": torch.float32}
    ModelRegistry().remember(
        BaseModel(), "load_diffusion_model", str(file), options, file=now(file)
    )
    assert options == {"dtype": torch.float32}


def test_a_registry_does_not_keep_a_model_alive(file):
    registry, model = ModelRegistry(), BaseModel()
    registry.remember(model, "load_diffusion_model", str(file), {}, file=now(file))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_keeps_other_weights_uncast_is_loaded_from_its_file_again(file):
    registry, model = ModelRegistry(), BaseModel()
    registry.remember(model, "load_diffusion_model", str(file), {}, file=now(file))
    old = registry.find(model)
    assert registry.find_loaded(model, []) == old
    new = registry.find_loaded(model, ["norm.scale"])
    assert new.number != old.number
    assert new.source == dataclasses.replace(old.source, uncast=["norm.scale"])
    assert registry.find_loaded(model, ["norm.scale"]) == registry.find(model) == new
    assert registry.take_gone() == [old.number]


def test_a_model_without_a_file_is_carried_whatever_it_keeps_uncast():
    registry, model = ModelRegistry(), BaseModel()
    assert registry.find_loaded(model, ["norm.scale"]) == registry.find(model)
