"""A LoRA scheduled by a hook is refused, and ComfyUI makes the image."""

from __future__ import annotations

from pathlib import Path

import torch
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.server import Server, base_directory
from rig.trees import Tree
from safetensors import safe_open
from safetensors.torch import save_file

DEADLINE_S = 600.0
HIDDEN = 512
RANK = 4
STEPS = 2
REASON = "the model has hook-scheduled weight patches"


def write_lora(flux_file: Path, path: Path) -> None:
    """Write a LoRA, as kohya's trainer does, for every matrix of the blocks."""
    generator, state = torch.Generator().manual_seed(5), {}
    with safe_open(flux_file, "pt") as flux:  # type: ignore[no-untyped-call]
        for key in flux.keys():  # noqa: SIM118 - safe_open is not a mapping
            shape = flux.get_slice(key).get_shape()
            if "_blocks." in key and key.endswith(".weight") and len(shape) == 2:
                name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
                up = torch.randn(shape[0], RANK, generator=generator) * 0.2
                state[f"{name}.lora_up.weight"] = up
                down = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
                state[f"{name}.lora_down.weight"] = down
                state[f"{name}.alpha"] = torch.tensor(float(RANK))
    path.parent.mkdir(parents=True)
    save_file(state, path)


def plain(seed: int) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=STEPS)


def hooked(seed: int) -> graphs.Graph:
    """The LoRA is on the positive conditioning alone."""
    graph = plain(seed)
    graph["hook"] = {
        "class_type": "CreateHookLoraModelOnly",
        "inputs": {"lora_name": "hook.safetensors", "strength_model": 1.0},
    }
    graph["hooked"] = {
        "class_type": "ConditioningSetProperties",
        "inputs": {
            "cond_NEW": ["6", 0],
            "hooks": ["hook", 0],
            "strength": 1.0,
            "set_cond_area": "default",
        },
    }
    graph["8"]["inputs"]["positive"] = ["hooked", 0]
    return graph


def test_hook_scheduled_lora_is_refused_and_equal_to_stock(tree: Tree, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for folder in models_directory(Sizes(hidden=HIDDEN)).iterdir():
        if folder.name != "loras":
            (models / folder.name).symlink_to(folder)
    flux = models / "diffusion_models" / "flux1-dev.safetensors"
    write_lora(flux, models / "loras" / "hook.safetensors")
    graph = hooked(seed=500)
    with (
        base_directory(tmp_path / "stock", models) as base,
        Server(tree, base, env={"XDIT_STRATEGY": "off"}) as stock,
    ):
        expected = stock.images(stock.run(graph, DEADLINE_S))
        without = stock.images(stock.run(plain(seed=500), DEADLINE_S))
    assert not compare_all(expected, without).is_equal, "the hook's LoRA changed nothing"
    env = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"}
    with base_directory(tmp_path / "ranks", models) as base, Server(tree, base, env=env) as ranks:
        images = ranks.images(ranks.run(graph, DEADLINE_S))
        refused = ranks.status()
        # Its weights are out of the model again: the same prompt without the hook is parallel.
        after = ranks.images(ranks.run(plain(seed=500), DEADLINE_S))
        run = ranks.status()["last_run"]
    difference = compare_all(expected, images)
    assert difference.is_equal, str(difference)
    assert refused["last_run"]["steps_parallel"] == 0
    assert refused["fall_back_reasons"] == {REASON: STEPS}
    difference = compare_all(without, after)
    assert difference.is_equal, str(difference)
    assert run["steps_parallel"] == run["steps"] == STEPS
