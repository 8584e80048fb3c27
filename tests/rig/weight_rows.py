"""The table of issue "every model as users load it": every way in which weights reach the sampler.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rig import graphs, weight_graphs
from rig.graphs import Graph
from rig.trees import Tree

SIZE = (128, 128)
STEPS = 2
SEED = 31

KOHYA, KOHYA_2 = "kohya.safetensors", "kohya2.safetensors"
OTHER = "flux1-dev-other.safetensors"

MIXED_PRECISION = "comfy/quant_ops.py"


@dataclass(frozen=True)
class Row:
    """One way to load weights.

    Attributes:
        graph: makes the graph from the plain one.
        needs: a file of ComfyUI and a text in it, without which this version cannot load the row.
    """

    graph: Callable[[Graph], Graph]
    needs: tuple[str, str] | None = None

    def runs_on(self, tree: Tree) -> bool:
        """Whether stock ComfyUI of this version can load it."""
        return self.needs is None or self.needs[1] in (tree.path / self.needs[0]).read_text()


def base_graph() -> Graph:
    """Return the plain graph that every row starts from."""
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=SEED, size=SIZE, steps=STEPS, save_latent=True)


def _lora(*loras: tuple[str, float]) -> Callable[[Graph], Graph]:
    return lambda graph: weight_graphs.with_loras(graph, *loras)


def _unet(
    name: str, weight_dtype: str = "default", *loras: tuple[str, float]
) -> Callable[[Graph], Graph]:
    return lambda graph: weight_graphs.with_loras(
        weight_graphs.with_unet(graph, f"flux1-dev{name}.safetensors", weight_dtype), *loras
    )


def _checkpoint(name: str, *loras: tuple[str, float]) -> Callable[[Graph], Graph]:
    return lambda graph: weight_graphs.with_loras(
        weight_graphs.with_checkpoint(graph, f"flux1-dev-{name}.safetensors"), *loras
    )


def _gguf(name: str, *loras: tuple[str, float]) -> Callable[[Graph], Graph]:
    return lambda graph: weight_graphs.with_loras(
        weight_graphs.with_gguf(graph, f"flux1-dev-{name}.gguf"), *loras
    )


def _quant(name: str, *loras: tuple[str, float], layout: str) -> Row:
    return Row(_unet(name, "default", *loras), needs=(MIXED_PRECISION, layout))


# Every row differs in its weights from the one before it.
ROWS: dict[str, Row] = {
    "plain": Row(lambda graph: graph),
    "LoRA, kohya": Row(_lora((KOHYA, 1.0))),
    "LoRA, negative strength": Row(_lora((KOHYA, -0.7))),
    "LoRA, diffusers": Row(_lora(("diffusers.safetensors", 1.0))),
    "LoRA, three stacked": Row(
        _lora((KOHYA, 0.6), ("diffusers.safetensors", 0.5), (KOHYA_2, -0.4))
    ),
    "LoKr": Row(_lora(("lokr.safetensors", 1.0))),
    "LoHa": Row(_lora(("loha.safetensors", 1.0))),
    "OFT": Row(_lora(("oft.safetensors", 1.0))),
    "LoRA, BFL control": Row(
        lambda graph: weight_graphs.with_control(
            weight_graphs.with_loras(graph, ("bfl-control.safetensors", 1.0)), *SIZE
        )
    ),
    "merge 0.5": Row(lambda graph: weight_graphs.with_merge(graph, OTHER, 0.5)),
    "merge 0.5 + LoRA": Row(
        lambda graph: weight_graphs.with_loras(
            weight_graphs.with_merge(graph, OTHER, 0.5), (KOHYA, 1.0)
        )
    ),
    "fp8_e4m3fn": Row(_unet("", "fp8_e4m3fn")),
    "fp8_e4m3fn + LoRA": Row(_unet("", "fp8_e4m3fn", (KOHYA, 1.0))),
    "fp8_e4m3fn_fast": Row(_unet("", "fp8_e4m3fn_fast")),
    "fp8_e5m2": Row(_unet("", "fp8_e5m2")),
    "scaled fp8": Row(_unet("-scaled-fp8")),
    "scaled fp8 + LoRA": Row(_unet("-scaled-fp8", "default", (KOHYA, 1.0))),
    "scaled fp8 with input scale": Row(_unet("-scaled-fp8-input")),
    "mixed fp8": _quant("-mixed-fp8", layout="float8_e4m3fn"),
    "mixed fp8 + LoRA": _quant("-mixed-fp8", (KOHYA, 1.0), layout="float8_e4m3fn"),
    "mixed fp8 with input scale": _quant("-mixed-fp8-input", layout="float8_e4m3fn"),
    "mixed fp8, formats in tensors": _quant("-mixed-fp8-tensors", layout="QUANT_ALGOS"),
    "mxfp8": _quant("-mxfp8", layout="mxfp8"),
    "mxfp8 + LoRA": _quant("-mxfp8", (KOHYA, 1.0), layout="mxfp8"),
    "nvfp4": _quant("-nvfp4", layout="nvfp4"),
    "nvfp4 + LoRA": _quant("-nvfp4", (KOHYA, 1.0), layout="nvfp4"),
    "nvfp4 with input scale": _quant("-nvfp4-input", layout="nvfp4"),
    "int8": _quant("-int8", layout="int8_tensorwise"),
    "int8 + LoRA": _quant("-int8", (KOHYA, 1.0), layout="int8_tensorwise"),
    "checkpoint, bf16": Row(_checkpoint("bf16")),
    "checkpoint, bf16 + LoRA": Row(_checkpoint("bf16", (KOHYA, 1.0))),
    "checkpoint, fp8": Row(_checkpoint("fp8")),
    "checkpoint, fp8 + LoRA": Row(_checkpoint("fp8", (KOHYA, 1.0))),
    "checkpoint, scaled fp8": Row(_checkpoint("scaled-fp8")),
    "checkpoint, mixed fp8": Row(_checkpoint("mixed-fp8-tensors")),
    "GGUF Q8_0": Row(_gguf("Q8_0")),
    "GGUF Q8_0 + LoRA": Row(_gguf("Q8_0", (KOHYA, 1.0))),
    "GGUF Q4_K": Row(_gguf("Q4_K")),
    "GGUF Q4_K + LoRA": Row(_gguf("Q4_K", (KOHYA, 1.0))),
}
