"""The table of XDIT_* variables: what a user may write and what it means.

Runs in: host and worker (and the command line). Standard library only.

``settings.py`` reads them; ``docs/settings.md`` is generated from here, and a test freezes the set
of names.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.strategy import LEGAL as STRATEGY_LEGAL

GPUS_LEGAL = (
    "all, a count such as 4, a list of indices such as 0,2,3, GPU UUIDs such as GPU-1a2b..., "
    "cpu:N for N CPU ranks, or 0 to switch off"
)

OF_XFUSER = ("XDIT_LOGGING_LEVEL",)
"""Variables of the same prefix that xfuser reads."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One XDIT_* variable: what a user may write and what it means."""

    name: str
    default: str
    legal: str
    meaning: str
    is_changeable: bool = True
    """While ComfyUI runs, by ``POST /xdit/settings``."""


VARIABLES = (
    Variable(
        "XDIT_GPUS",
        "all",
        GPUS_LEGAL,
        "Which GPUs make one image together. A lone number is a count, a list (with a comma) is "
        "indices as ComfyUI's own process sees them. `cpu:N` starts N CPU ranks, for trying it "
        "out without a GPU.",
    ),
    Variable(
        "XDIT_STRATEGY",
        "auto",
        STRATEGY_LEGAL,
        "How the work is shared. `auto` shares a batch first (also the "
        "conditional and unconditional half of CFG), then the token sequence. Another exact plan "
        "that could be faster, and ComfyUI alone, take turns with it in the first steps of a model "
        "and size, the fastest is taken from then on, and `comfy-xdit verdicts` shows and clears "
        "what is remembered. "
        "A name puts all ranks on one axis: `batch` shares rows, `ulysses` tokens by all-to-all, "
        "`ring` tokens by passing keys and values round, `usp` tokens by both, `tensor` the heads "
        "and columns of every block, with their weights: each card holds a part of the blocks, and "
        "sends more than with `ulysses`. `fsdp` shares as `auto` does, unmeasured, and shards the "
        "weights over all ranks, which `auto` does only where they do not fit. A plan gives the "
        "degree of each axis, in any order; their product is the number of ranks, and so are "
        "`fsdp` and `modulation` in it. With `modulation` each rank holds a part of what modulates "
        "FLUX.1's blocks, 27 % of its weights; `auto` does so where the model fits only then. By "
        "name it also has plain fp8 weights, which ComfyUI casts in each step, cast once where all "
        "cards have room. "
        "All of these are exact. `pipefusion` is an approximation, used only by name or in "
        "a plan such as `pipefusion=2,ulysses=2`: blocks in stages, tokens in patches that stream "
        "through them, keys and values of the step before for the patches to come. A call that the "
        "named strategy cannot share runs on one GPU, and the log says why. "
        "`off` leaves stock ComfyUI: nothing is wrapped, nothing is imported.",
    ),
    Variable(
        "XDIT_BALANCE",
        "adaptive",
        "even, weighted, adaptive or least_loaded",
        "How much of the work each rank gets: tokens, heads and rows of the batch. `even`: all "
        "the same. `weighted`: in proportion to the speed measured in the first six calls of a "
        "model; then fixed until the workers start anew. `adaptive`: measured all the time, and "
        "changed between two steps when there is at least 4 % of a call to gain; ranks that are "
        "about as fast as each other keep even shares. `least_loaded`: as `adaptive`, and at the "
        "start of a run the shares also follow what other programs took of each rank's device "
        "just before: of a GPU's time (asked of NVML, process by process) or else of its memory "
        "when the worker started, of a CPU rank's cores; at most half is taken off, as if two"
        " programs shared the device evenly. Shares say where a token is computed, so the "
        "image is the same, up to rounding. While a node keeps something on the ranks from step "
        "to step, shares stay as they are until the run ends; and they stay even where a larger "
        "one would not fit on its card beside the weights.",
    ),
    Variable(
        "XDIT_TRANSFER_DTYPE",
        "exact",
        "exact, int8 or fp8",
        "In which form q, k, v and attention's output travel between ranks that exchange tokens "
        "for heads (`ulysses`, also in `auto` and `usp`). `exact`: in the model's dtype. `int8` "
        "and `fp8` (e4m3): in 8 bits, with a scale for each 32 values: 53 % of bf16's bytes, for "
        "GPUs whose links are slow. Both are approximations, used only by name, and the log's line "
        "for a run says so; `int8` is two to four times nearer to the exact image, on any GPU "
        "([how near](parity.md#transfers-in-8-bits)). Nothing else changes its form: keys that go "
        "round a ring, sums of `tensor`, weights, and what `pipefusion` exchanges. A change takes "
        "new workers.",
    ),
    Variable(
        "XDIT_GPU_MEMORY",
        "auto",
        "auto, or GiB of each card, a number above 0 such as 24",
        "How much memory of each card the workers may plan with. `auto` asks the cards. A number "
        "plans as if every card had that much, whether more or less is there; it works with CPU "
        "ranks too. `comfy-xdit doctor` shows the plan that follows: all weights on every card, "
        "weights sharded over the ranks, or weights in CPU memory.",
    ),
    Variable(
        "XDIT_VAE",
        "auto",
        "auto or off",
        "Whether the ranks decode large pictures together when the steps are done. `auto`: from "
        "1024 x 1024 px on, with a VAE of FLUX's as ComfyUI loads it; the first four pictures of a "
        "size are decoded by the ranks and by ComfyUI in turn, and the faster way is taken from "
        "then on. What ComfyUI decodes in tiles is shared by tiles. `off`: ComfyUI decodes.",
    ),
    Variable(
        "XDIT_CUDA_GRAPHS",
        "off",
        "off or on",
        "Whether GPU ranks make one CUDA graph of a step's forward, which is launched at once "
        "instead of kernel by kernel. `on`: from the third step of a size on, where weights lie "
        "whole on the card, no node's patch takes part, and a replay gave the same bits on every "
        "rank; otherwise steps run as ever, and the log says why. It takes the working memory of "
        "a step once more. No GPU has run it yet, so it is off.",
    ),
    Variable(
        "XDIT_STRICT",
        "0",
        "0 or 1",
        "1 turns every fall-back to one GPU into an error. For tests and benchmarks.",
    ),
    Variable(
        "XDIT_START",
        "early",
        "early or first",
        "How the workers start. `early`: their imports begin as soon as ComfyUI's server is up, in "
        "the background, in one process that ranks are then made from; it holds about 400 MB of "
        "memory, and nothing of any GPU. The ranks start with the first FLUX model, and until they "
        "are ready, ComfyUI computes alone where its own copy of the model is at hand; then the "
        "image goes on in parallel. `first`: all begins with the first FLUX model, and its image "
        "waits for it.",
    ),
    Variable(
        "XDIT_START_TIMEOUT",
        "180",
        "seconds, a number above 0",
        "How long all workers together may take to start, import ComfyUI and join. After that "
        "the missing ranks are named with the last lines of their logs, and ComfyUI goes on alone.",
    ),
    Variable(
        "XDIT_STEP_TIMEOUT",
        "600",
        "seconds, a number above 0",
        "How long the workers may go on without any sign of progress, in a load or in the first "
        "step of its kind, before they count as hung. They are then ended and the step is run on "
        "one GPU. Later steps have ten times what the slowest one took, and 20 seconds at least.",
    ),
    Variable(
        "XDIT_IDLE_TIMEOUT",
        "off",
        "off, or seconds, a number above 0",
        "After how long without a FLUX image the ranks end, between two prompts, and give back all "
        "that they hold: memory, cards, ports. The next FLUX model starts them as the first one "
        "did. The process that `XDIT_START=early` makes them from stays; with `first` it ends too.",
    ),
    Variable(
        "XDIT_CPU_THREADS",
        "1",
        "a whole number from 1",
        "Threads of one CPU rank.",
    ),
    Variable(
        "XDIT_LOG_DIR",
        "temporary",
        "temporary, or the absolute path of a folder, which is made if it is not there",
        "Where the workers' logs lie. `temporary` is the system's folder for temporary files. Each "
        "ComfyUI makes a folder of its own in it, which stays until the second start after it.",
        is_changeable=False,
    ),
    Variable(
        "XDIT_REMOTE_SETTINGS",
        "0",
        "0 or 1",
        "1 lets other machines that reach ComfyUI's port change settings too, and whoever comes "
        "through a proxy or by another name of this machine; see [security](security.md).",
        is_changeable=False,
    ),
    Variable(
        "XDIT_STATUS",
        "local",
        "local or all",
        "Who is told everything by `GET /xdit/status` and `GET /xdit/metrics`. `local`: whoever "
        "asks from this machine; others get the state, the number of ranks and two counts. "
        "`all`: whoever reaches ComfyUI's port.",
    ),
)
