"""A forward of FLUX.1 on 2 CPU ranks: ours of ComfyUI's model, xfuser's of diffusers' model.

Runs in: the rig's environment. Both models have the same width, blocks and tokens, in float32, and
random weights of their own. In every round xfuser's ranks compute, then diffusers' model alone in
one of them, then ours, then one rank of ours; the others sleep.

xfuser's class is ``xFuserFlux1Transformer2DWrapper``, which shards tokens in its ``forward``. The
other one, ``xFuserFluxTransformer2DWrapper``, is PipeFusion's: its pipeline shards tokens, and it
is tried as that pipeline calls it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
import torch.distributed as dist
from bench import xfuser_cpu
from bench.ranks import CONTEXT, running
from bench.rows import Row, compared
from bench.unequal_ranks import Bench, write_model
from rig.trees import Tree

NUM_RANKS = 2
WIDTH, TEXT, TEXT_WIDTH = 1024, 256, 4096
SIDE, ODD_SIDE = 64, 62
"""Of the latent; a token is 2 x 2. ``ODD_SIDE``: 31 x 31 tokens, which 2 ranks do not divide."""
ODD_TEXT = 77
DEADLINE_S = 300.0


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """A forward of both against each other and each against its own model alone."""
    num_rounds = 3 if is_quick else 9
    gate = CONTEXT.Barrier(NUM_RANKS + 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(NUM_RANKS, run_rank, gate, num_rounds) as ranks,
    ):
        path = f"{folder}/model.safetensors"
        write_model(tree, path, hidden=WIDTH, blocks=1, context=TEXT_WIDTH)
        one = Bench(tree, "cpu:1", "ulysses", path, SIDE)
        pair = Bench(tree, f"cpu:{NUM_RANKS}", "ulysses", path, SIDE)
        try:
            for _ in range(num_rounds):
                _let_through(gate)
                _let_through(gate)
                pair.calls("step", "even", 1)
                one.calls("step", "even", 1)
            error = relative(pair.forward(Path(folder, "o")), one.forward(Path(folder, "p")))
        finally:
            one.close()
            pair.close()
        found = ranks.results(DEADLINE_S)
    theirs, alone = (
        [max(each) for each in zip(*(rank[k] for rank in found), strict=True)]
        for k in ("xfuser_s", "alone_s")
    )
    worst = {
        name: xfuser_cpu.worst([rank["cases"][name] for rank in found])
        for name in found[0]["cases"]
    }
    ours = pair.seconds["step"]
    about = (
        f"forward of width {WIDTH}, 1 + 1 blocks, {TEXT} + {(SIDE // 2) ** 2} tokens, 2 CPU ranks"
    )
    return [
        compared(f"{about}: ours against xfuser's", "s", ours, theirs),
        compared(f"{about}: ours against one rank", "s", ours, one.seconds["step"], f"{error:.1e}"),
        compared(
            f"{about}: xfuser's against diffusers alone", "s", theirs, alone, found[0]["parity"]
        ),
        *(
            Row(f"xfuser's FLUX, 2 CPU ranks: {name}", None, "", parity=xfuser_cpu.said(error))
            for name, error in worst.items()
        ),
    ]


def _let_through(gate: Any) -> None:
    """Wait for all ranks; where one has ended, ``results`` says so."""
    try:
        gate.wait(DEADLINE_S)
    except BrokenBarrierError:
        return


def run_rank(rank: int, gate: Any, num_rounds: int) -> dict[str, Any]:
    """Compute when the gate opens; then try what xfuser's classes make of other sizes."""
    xfuser_cpu.prepare()
    from diffusers import FluxTransformer2DModel
    from xfuser.core.distributed import get_runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.models.transformers import transformer_flux as theirs

    xfuser_cpu.have_groups(ulysses=NUM_RANKS, ring=1)
    get_runtime_state().set_attention_backend(AttentionBackendType.SDPA)
    get_runtime_state().max_condition_sequence_length = TEXT  # Its pipeline would say so.
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": WIDTH // 128,
        "joint_attention_dim": TEXT_WIDTH,
        "guidance_embeds": True,
    }
    torch.manual_seed(1)
    alone = FluxTransformer2DModel(**sizes).eval()
    shared = theirs.xFuserFlux1Transformer2DWrapper(**sizes).eval()
    shared.load_state_dict(alone.state_dict())
    call = arguments()
    found: dict[str, Any] = {"xfuser_s": [], "alone_s": []}
    shared(**call), alone(**call)
    for _ in range(num_rounds):
        gate.wait(DEADLINE_S)
        dist.barrier()
        found["xfuser_s"].append(seconds(lambda: shared(**call)))
        dist.barrier()
        found["alone_s"].append(seconds(lambda: alone(**call)) if rank == 0 else 0.0)
        dist.barrier()
        gate.wait(DEADLINE_S)
    found["parity"] = f"{relative(shared(**call)[0], alone(**call)[0]):.1e}"
    cases = {f"{ODD_TEXT} text tokens": arguments(text=ODD_TEXT)}
    cases["31 x 31 image tokens"] = arguments(side=ODD_SIDE)
    found["cases"] = {
        name: xfuser_cpu.outcome(lambda case=case: relative(shared(**case)[0], alone(**case)[0]))
        for name, case in cases.items()
    }
    expected = alone(**call)[0].chunk(NUM_RANKS, 1)[rank]
    shard = {
        name: value.chunk(NUM_RANKS, -2)[rank]
        if name in ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids")
        else value
        for name, value in call.items()
    }
    found["cases"]["xFuserFluxTransformer2DWrapper"] = xfuser_cpu.outcome(
        # It changes the model that it is given.
        lambda: relative(theirs.xFuserFluxTransformer2DWrapper(alone)(**shard)[0][0], expected)
    )
    return found


def arguments(*, text: int = TEXT, side: int = SIDE) -> dict[str, Any]:
    """Random arguments of diffusers' FLUX."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    side //= 2
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return {
        "hidden_states": noise(1, side * side, 64),
        "encoder_hidden_states": noise(1, text, TEXT_WIDTH),
        "pooled_projections": noise(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cat([torch.zeros(side * side, 1), places], dim=1),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()
