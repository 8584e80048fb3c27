"""An image of 1024 x 1024 px over HTTP, whose latent the ranks decode too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.encoder_weights import kl_vae
from rig.model_cache import model_set
from rig.pair import STRICT, run_pair
from rig.server import Server
from rig.status_schema import decodes
from rig.trees import Tree
from rig.weight_graphs import with_compute_dtype
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,  # a KL VAE takes 10 CPU-seconds for so many pixels, the steps as many
    pytest.mark.newest_only,
]


def models() -> Path:
    """Return the tiny models, with a narrow VAE of FLUX.1's structure beside its own."""

    def write(building: Path) -> None:
        shutil.copytree(models_directory(Sizes()), building)
        whole = kl_vae(encoder_width=32, decoder_width=32, seed=7)
        state = {name: tensor for name, tensor in whole.items() if name.startswith("decoder.")}
        # FLUX.2's has 32 channels there.
        state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :16] * 2**0.5
        save_file(state, building / "vae" / "kl.safetensors")

    return model_set("with-kl-decoder", write)


TILED = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
CARDS = {"device": "emulated", "extra_args": ("--fp32-vae",), "EMULATED_CARDS": "4090,4090"}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "in tiles": {},
    "in tiles, on emulated cards": {**CARDS, "env": {"XDIT_GPUS": "0,1"}},
}


@pytest.mark.parametrize("case", CASES)
def test_an_image_is_stock_comfyuis(
    servers: Callable[..., Server],
    tree: Tree,
    record_property: Callable[[str, object], None],
    case: str,
) -> None:
    if "decoder_ch " not in (tree.path / "comfy" / "sd.py").read_text():
        pytest.skip("this ComfyUI reads no width of a VAE from the file")
    graph = graphs.with_values(
        graphs.load("ksampler_dev"),
        **{"size": (1024, 1024), "steps": 1, "save_latent": True},
        seed=4 + list(CASES).index(case),  # ComfyUI samples nothing twice.
    )
    graph = graphs.set_inputs(graph, vae_name="kl.safetensors")
    graph = with_compute_dtype(graph, "fp32")  # Cards would compute in bf16.
    how = ""
    if case != "whole":
        (decode,) = (node for node in graph.values() if node["class_type"] == "VAEDecode")
        decode["class_type"], how = "VAEDecodeTiled", " in tiles"
        decode["inputs"].update(TILED)
    env = CASES[case].get("env", {"XDIT_GPUS": "cpu:2"})
    setup = {name: value for name, value in CASES[case].items() if name != "env"}
    pair = run_pair(servers, tree, graph, 2, models=models(), env=env, **setup)
    record_property("decoding", {"difference": str(pair.difference), **decodes(pair.after)})
    assert decodes(pair.after)["parallel"] == decodes(pair.before)["parallel"] + 1
    assert decodes(pair.after)["alone"] == {}
    ranks = servers(tree, **STRICT, models=models(), **env, **setup)
    assert f"xDiT: 1024 x 1024 px decoded{how} on 2 " in ranks.log_path.read_text()
