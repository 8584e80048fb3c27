"""The table of issue "every model as users load it": every way in which weights reach the sampler.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rig import graphs, weight_graphs
from rig.graphs import Graph
from rig.trees import Need, Tree

SIZE = (128, 128)
STEPS = 2
SEED = 31

PLAIN, WITH_LORA = "plain", "LoRA, kohya"
KOHYA = "kohya.safetensors"
OTHER = "flux1-dev-other.safetensors"

# What servers need for every row.
SETUP: dict[str, Any] = {
    "variants": True,
    "node_packs": (Path(__file__).with_name("gguf_pack"),),
}

# Where a version of ComfyUI shows that it knows a format.
LAYOUTS, LAYERS = "comfy/quant_ops.py", "comfy/ops.py"


@dataclass(frozen=True)
class Row:
    """One way to load weights.

    Attributes:
        graph: makes the graph from the plain one.
        close_to: the row whose image stock ComfyUI nearly reproduces, because only the precision
            differs; None if the image must differ visibly from the plain one.
        needs: a file of ComfyUI and a text in it, without which this version cannot load the row.
    """

    graph: Callable[[Graph], Graph]
    close_to: str | None = None
    needs: Need | None = None

    @property
    def noisy(self) -> bool:
        """Whether the kernel rounds activations, so that noise of 1e-7 shows (``pair.NOISY``)."""
        return self.needs is not None and self.needs[1] == "int8_tensorwise"

    def runs_on(self, tree: Tree) -> bool:
        """Whether stock ComfyUI of this version can load it."""
        return tree.has(self.needs)


def base_graph() -> Graph:
    """Return the plain graph that every row starts from."""
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=SEED, size=SIZE, steps=STEPS, save_latent=True)


def _loras(*loras: tuple[str, float]) -> Row:
    return Row(lambda graph: weight_graphs.with_loras(graph, *loras))


def _rows(
    name: str, load: Callable[[Graph], Graph], needs: Need | None, lora: bool
) -> dict[str, Row]:
    """Return a row whose weights differ from plain in precision only, and one with a LoRA on it."""

    def with_lora(graph: Graph) -> Graph:
        return weight_graphs.with_loras(load(graph), (KOHYA, 1.0))

    rows = {name: Row(load, PLAIN, needs)}
    return rows | ({f"{name} + LoRA": Row(with_lora, WITH_LORA, needs)} if lora else {})


def _unet(
    name: str,
    suffix: str,
    weight_dtype: str = "default",
    needs: Need | None = None,
    lora: bool = False,
) -> dict[str, Row]:
    file = f"flux1-dev{suffix}.safetensors"
    load = partial(weight_graphs.with_unet, name=file, weight_dtype=weight_dtype)
    return _rows(name, load, needs, lora)


def _checkpoint(suffix: str, needs: Need | None = None, lora: bool = False) -> dict[str, Row]:
    file = f"flux1-dev-{suffix}.safetensors"
    load = partial(weight_graphs.with_checkpoint, name=file)
    return _rows(f"checkpoint, {suffix}", load, needs, lora)


def _gguf(kind: str) -> dict[str, Row]:
    load = partial(weight_graphs.with_gguf, name=f"flux1-dev-{kind}.gguf")
    return _rows(f"GGUF {kind}", load, None, lora=True)


# Within a group, every row differs in its weights from the one before it.
GROUPS: dict[str, dict[str, Row]] = {
    "LoRA": {
        PLAIN: Row(lambda graph: graph, close_to=PLAIN),
        WITH_LORA: _loras((KOHYA, 1.0)),
        "LoRA, negative strength": _loras((KOHYA, -0.7)),
        "LoRA, diffusers": _loras(("diffusers.safetensors", 1.0)),
        "LoRA, three stacked": _loras(
            (KOHYA, 0.6), ("diffusers.safetensors", 0.5), ("kohya2.safetensors", -0.4)
        ),
        "LoKr": _loras(("lokr.safetensors", 1.0)),
        "LoHa": _loras(("loha.safetensors", 1.0)),
        "OFT": _loras(("oft.safetensors", 1.0)),
        "LoRA, BFL control": Row(
            lambda graph: weight_graphs.with_control(
                weight_graphs.with_loras(graph, ("bfl-control.safetensors", 1.0)), *SIZE
            )
        ),
        "LoRA, after the control LoRA": _loras((KOHYA, 1.0)),  # img_in has its old shape again
    },
    "merge": {
        "merge 0.5": Row(lambda graph: weight_graphs.with_merge(graph, OTHER, 0.5)),
        "merge 0.5 + LoRA": Row(
            lambda graph: weight_graphs.with_loras(
                weight_graphs.with_merge(graph, OTHER, 0.5), (KOHYA, 1.0)
            )
        ),
    },
    "dtype of the file": _unet("fp16 file", "-fp16", lora=True)
    | _unet("bf16 file, fp32 vectors", "-fp32-vectors", lora=True)
    | _unet("fp8 file", "-fp8", lora=True),
    "fp8": _unet("fp8_e4m3fn", "", "fp8_e4m3fn", lora=True)
    | _unet("fp8_e4m3fn_fast", "", "fp8_e4m3fn_fast")
    | _unet("fp8_e5m2", "", "fp8_e5m2")
    | _unet("scaled fp8", "-scaled-fp8", lora=True)
    | _unet("scaled fp8, input scale", "-scaled-fp8-input"),
    "mixed precision": _unet("mixed fp8", "-mixed-fp8", lora=True)
    | _unet("mixed fp8, input scale", "-mixed-fp8-input")
    | _unet("mixed fp8, comfy_quant", "-mixed-fp8-tensors", needs=(LAYERS, "comfy_quant"))
    | _unet("mxfp8", "-mxfp8", needs=(LAYOUTS, "mxfp8"), lora=True)
    | _unet("nvfp4", "-nvfp4", needs=(LAYOUTS, "nvfp4"), lora=True)
    | _unet("nvfp4, input scale", "-nvfp4-input", needs=(LAYOUTS, "nvfp4"))
    | _unet("int8", "-int8", needs=(LAYOUTS, "int8_tensorwise"), lora=True),
    "checkpoint": _checkpoint("bf16", lora=True)
    | _checkpoint("fp8", lora=True)
    | _checkpoint("scaled-fp8")
    | _checkpoint("mixed-fp8-tensors", needs=(LAYERS, "comfy_quant")),
    "GGUF": _gguf("Q8_0") | _gguf("Q4_K"),
}
ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}
