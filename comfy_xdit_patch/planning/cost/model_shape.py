"""What is to be computed, on whatever machine: the FLUX family's models as numbers, and a call.

Runs in: the command line's process. No torch: planning asks before a model is there.

A model is widths, blocks, weights and FLOPs; a job is one call of it, its precision, and how
kernels start.

Letters: D features, S tokens of the whole sequence (text, image, references), L blocks.

    weights   one stream of a double block, and a single block: (4 + m) D^2, of which m D^2 are the
              MLP's: 2 x ratio, or 3 x ratio where it is gated. AdaLN: 6 D^2 for each stream of a
              double block, 3 D^2 for a single one; or 15 D^2 once for all blocks
    FLOPs     2 (4 + m) D^2 S L in linears, 4 S^2 D L in attention

Source: ComfyUI's ``comfy/ldm/flux`` and ``comfy/ldm/chroma``; FLUX.1-dev comes to 11 901 408 320
weights, as published, and 74.4 TFLOP for 1024 px and 512 text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from comfy_xdit_patch.planning.family import HEAD_WIDTH
from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.residency import ModelSizes
from comfy_xdit_patch.planning.transfers import TransferDtype

COMPUTE_BYTES = 2
"""bf16: what activations are on a GPU, whatever the weights are stored as."""

PX_PER_TOKEN = 16
"""Side of a token in pixels: 8 or 16 by the VAE, 2 or 1 by the patch."""

EMBEDDING_WIDTH = 256
"""Of a time step or a guidance strength, before its embedder."""

# Chroma's network that makes every block's modulation: ``Approximator`` of
# comfy/ldm/chroma/layers.py with the sizes that comfy/model_detection.py gives it.
APPROXIMATOR_IN = 64
APPROXIMATOR_WIDTH = 5120
APPROXIMATOR_LAYERS = 5


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are stored, and whether linears multiply in fp8."""

    name: str
    bytes_per_weight: float
    is_fp8_compute: bool = False
    bytes_per_value: int = COMPUTE_BYTES
    """Of activations, and of weights where they are multiplied."""

    @property
    def is_in_groups(self) -> bool:
        """Whether groups of values have a scale, and several values a byte: no weight is cut."""
        return self.bytes_per_weight < 1

    @property
    def as_cast(self) -> Precision | None:
        """Of weights that are held as they are multiplied; None where that is not done."""
        if self.bytes_per_weight != 1 or self.is_fp8_compute:
            return None
        return replace(self, bytes_per_weight=self.bytes_per_value)


FLOAT32 = Precision("fp32", 4, bytes_per_value=4)
"""What ComfyUI computes in on a CPU."""

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", 2),
        Precision("fp8", 1),
        Precision("fp8-compute", 1, is_fp8_compute=True),
        # 4.5 bits: a scale of 8 or 16 bits for each 16 or 32 weights (nvfp4, Q4_0).
        Precision("4bit", 0.5625),
    )
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One architecture.

    ``modulation``: the AdaLN linears are in each block (FLUX.1), one set for all blocks (FLUX.2),
    or a network of its own (Chroma). ``embedded`` are the widths of the vectors that are embedded
    beside image and text: time step, guidance, pooled text. ``num_text_tokens`` is what ComfyUI
    pads a short prompt to; ``num_steps`` what the model's own templates take.
    """

    name: str
    width: int
    num_double_blocks: int
    num_single_blocks: int
    mlp_ratio: int
    is_gated: bool
    has_bias: bool
    modulation: Literal["blocks", "global", "approximator"]
    in_width: int
    out_width: int
    text_width: int
    embedded: tuple[int, ...]
    num_text_tokens: int
    num_steps: int
    num_references: int = 0

    @property
    def num_heads(self) -> int:
        return self.width // HEAD_WIDTH

    @property
    def num_blocks(self) -> int:
        return self.num_double_blocks + self.num_single_blocks

    @property
    def num_gathers(self) -> int:
        """All-reduces of one forward under tensor parallelism: two in a double block."""
        return 2 * self.num_double_blocks + self.num_single_blocks

    @property
    def num_modulation_weights(self) -> int:
        """Weights that are read for one row, whatever the number of tokens."""
        if self.modulation == "approximator":
            hidden = APPROXIMATOR_WIDTH
            return (
                self._linear(APPROXIMATOR_IN, hidden)
                + APPROXIMATOR_LAYERS * (2 * self._linear(hidden, hidden) + hidden)
                + self._linear(hidden, self.width)
            )
        if self.modulation == "global":
            return self._linear(self.width, 15 * self.width)
        return 2 * self.num_double_blocks * self._linear(
            self.width, 6 * self.width
        ) + self.num_single_blocks * self._linear(self.width, 3 * self.width)

    @property
    def num_modulation_outputs(self) -> int:
        """Shifts, scales and gates of all blocks, for each row; none where blocks make none."""
        if self.modulation != "blocks":
            return 0
        return (12 * self.num_double_blocks + 3 * self.num_single_blocks) * self.width

    @property
    def num_weights(self) -> int:
        return (
            self.num_double_blocks * self._block(is_double=True)
            + self.num_single_blocks * self._block(is_double=False)
            + self._num_outside
        )

    @property
    def later_part(self) -> float:
        """The MLP's columns of single blocks' first linears, as a part of all linears' FLOPs.

        Ranks compute them while q, k and v are exchanged (``worker/shard/later_columns.py``).
        """
        return self._mlp_in * self.num_single_blocks / ((4 + self._mlp) * self.num_blocks)

    def linear_flops(self, num_tokens: int) -> float:
        """FLOPs of one forward's linears, for one row of the batch."""
        return 2.0 * (4 + self._mlp) * self.width**2 * num_tokens * self.num_blocks

    def attention_flops(self, num_tokens: int) -> float:
        """FLOPs of one forward's attention, for one row of the batch."""
        return 4.0 * num_tokens**2 * self.width * self.num_blocks

    def sizes(self, precision: Precision) -> ModelSizes:
        """Bytes as ``residency`` counts them."""
        largest = max(self._block(is_double=True), self._block(is_double=False))
        # A single block's first linear: q, k, v and the way into the MLP.
        widest = self._linear(self.width, (3 + self._mlp_in) * self.width)
        size = precision.bytes_per_weight
        as_cast = precision.as_cast if self.modulation == "blocks" else None
        return ModelSizes(
            total_bytes=round(size * self.num_weights),
            largest_block_bytes=round(size * largest),
            outside_blocks_bytes=round(size * self._num_outside),
            cast_bytes=0
            if size == precision.bytes_per_value
            else precision.bytes_per_value * widest,
            modulation_bytes=round(size * self.num_modulation_weights)
            if self.modulation == "blocks" and not precision.is_in_groups
            else 0,
            as_cast=None if as_cast is None else self.sizes(as_cast),
        )

    @property
    def _mlp(self) -> int:
        return self.mlp_ratio * (3 if self.is_gated else 2)

    @property
    def _mlp_in(self) -> int:
        return self.mlp_ratio * (2 if self.is_gated else 1)

    def _linear(self, columns: int, rows: int) -> int:
        return columns * rows + (rows if self.has_bias else 0)

    def _block(self, *, is_double: bool) -> int:
        width, hidden = self.width, self.mlp_ratio * self.width
        into = self._mlp_in * width
        norms = 2 * HEAD_WIDTH
        if is_double:
            stream = (
                self._linear(width, 3 * width)
                + self._linear(width, width)
                + self._linear(width, into)
                + self._linear(hidden, width)
                + norms
            )
            own = self._linear(width, 6 * width) if self.modulation == "blocks" else 0
            return 2 * (stream + own)
        own = self._linear(width, 3 * width) if self.modulation == "blocks" else 0
        both = self._linear(width, 3 * width + into) + self._linear(width + hidden, width)
        return both + norms + own

    @property
    def _num_outside(self) -> int:
        width = self.width
        last = self._linear(width, self.out_width)
        if self.modulation != "approximator":
            last += self._linear(width, 2 * width)
        return (
            self._linear(self.in_width, width)
            + self._linear(self.text_width, width)
            + sum(self._linear(n, width) + self._linear(width, width) for n in self.embedded)
            + last
            + (0 if self.modulation == "blocks" else self.num_modulation_weights)
        )


def workload_for(
    shape: ModelShape,
    *,
    width_px: int,
    height_px: int,
    num_rows: int = 1,
    num_text_tokens: int | None = None,
    num_references: int | None = None,
) -> Workload:
    """Turn an image into tokens. References have the image's size."""
    num_image_tokens = -(-width_px // PX_PER_TOKEN) * -(-height_px // PX_PER_TOKEN)
    text = shape.num_text_tokens if num_text_tokens is None else num_text_tokens
    references = shape.num_references if num_references is None else num_references
    return Workload(
        batch_size=num_rows,
        num_text_tokens=text,
        num_image_tokens=num_image_tokens,
        num_heads=shape.num_heads,
        num_reference_tokens=references * num_image_tokens,
    )


@dataclass(frozen=True, slots=True)
class Execution:
    """How kernels reach the GPU.

    ``elementwise_values`` is what unfused kernels read and write for each token and block, in
    units of its features. Calls are ATen operators from Python.
    """

    name: str
    elementwise_values: float
    calls_per_block: float
    calls_per_attention: float
    """Beside those, where tokens or columns are shared: two collectives and their copies."""
    calls_per_shared_modulation: float
    """Once a forward, where that is shared."""
    calls_per_later_columns: float
    """In each single block, where columns wait for an exchange."""
    calls_per_halves: float
    """In each block, where heads are exchanged in halves."""
    calls_per_quantised: float
    """In each exchange of heads that travel in 8 bits."""


EAGER = Execution(
    "eager",
    # Fitted to eager against compiled: SGLang on H100 46, cache-dit on L20 61, flumina on 4090 67.
    elementwise_values=60,
    # Counted in ComfyUI: 3790 for FLUX.1's 57 blocks (FLUX.2: 2749 for 56).
    calls_per_block=66.5,
    # Counted (tests/parallel/test_counted_calls.py): 13 of torch and 2 exchanges by ulysses.
    calls_per_attention=15,
    # Counted (the same test).
    calls_per_shared_modulation=13,
    # Counted (the same test).
    calls_per_later_columns=7,
    # Counted (the same test): 22 of torch and 2 exchanges.
    calls_per_halves=24,
    # Counted (the same test).
    calls_per_quantised=18,
)
COMPILED = Execution("compiled", 0, 0, 0, 0, 0, 0, 0)
CALLS_BESIDE_GRAPH = 9
"""Of a forward that is one CUDA graph: 5 arguments are copied there (counted, the same test), two
arrive, the result leaves, and the graph is launched, taken to cost what a call does."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model call, and how many of them a run has."""

    shape: ModelShape
    workload: Workload
    precision: Precision
    num_steps: int
    execution: Execution = EAGER
    overlaps: bool = True
    """Whether ranks compute while tokens are on their way."""
    transfer_dtype: TransferDtype = "exact"
    """In which form heads travel."""
    captures: bool = False
    """Whether the forward of several ranks is a CUDA graph, where their weights lie on the card."""

    @property
    def has_later_columns(self) -> bool:
        """Whether the MLP's columns can wait: of weights that are multiplied as stored, or cast.

        A compiled block runs in one piece.
        """
        is_product = not (self.precision.is_fp8_compute or self.precision.is_in_groups)
        return self.overlaps and is_product and self.execution != COMPILED

    @property
    def num_tokens(self) -> int:
        return self.workload.num_tokens
