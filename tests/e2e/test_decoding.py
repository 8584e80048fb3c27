"""An image of 1024 x 1024 px over HTTP, whose latent the ranks decode too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.encoder_weights import kl_vae
from rig.model_cache import model_set
from rig.pair import STRICT, run_pair
from rig.server import Server
from rig.status_schema import decodes
from rig.trees import Tree
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


def test_an_image_is_stock_comfyuis(
    servers: Callable[..., Server],
    tree: Tree,
    record_property: Callable[[str, object], None],
) -> None:
    if "decoder_ch " not in (tree.path / "comfy" / "sd.py").read_text():
        pytest.skip("this ComfyUI reads no width of a VAE from the file")
    graph = graphs.with_values(
        graphs.load("ksampler_dev"), size=(1024, 1024), steps=1, seed=4, save_latent=True
    )
    graph = graphs.set_inputs(graph, vae_name="kl.safetensors")
    pair = run_pair(servers, tree, graph, 2, models=models())
    record_property("decoding", {"difference": str(pair.difference), **decodes(pair.after)})
    assert decodes(pair.after)["parallel"] == decodes(pair.before)["parallel"] + 1
    assert decodes(pair.after)["alone"] == {}
    ranks = servers(tree, XDIT_GPUS="cpu:2", **STRICT, models=models())
    assert "xDiT: 1024 x 1024 px decoded on 2 CPU ranks, " in ranks.log_path.read_text()
