"""What lies on each card while people work: as the plan says, given back, and never read twice.

Emulated cards with one ledger for all processes (``rig/emulated_gpu``). They are smaller than real
ones and contexts, communicators and ComfyUI's reserves are not, so a card of 4 GiB has room for a
small model and for what ComfyUI does beside it, and one of 2.5 GiB has not.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.emulated_gpu.emulated_ledger import Ledger
from rig.feature_models import feature_models
from rig.feature_run import COMMON_PACKS, write_inputs
from rig.feature_table import FEATURES
from rig.graphs import Graph
from rig.pair import STRICT
from rig.server import LEDGER, Server, base_directory
from rig.status_schema import counted
from rig.trees import Tree
from rig.weight_graphs import with_loras, with_unet
from rig.weight_rows import KOHYA, OTHER
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.slow,  # every call with a card's tensor passes through Python
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]

MIB = 1 << 20
CONTEXT, GROUP, RESERVE = 600 * MIB, 256 * MIB, 500 * MIB
SIZES = Sizes(hidden=1024, double=4, single=4, variants=True)
"""420 MiB in bf16."""
DEADLINE_S = 400.0
NUM_STEPS = 2
Record = Callable[[str, object], None]


def prompt(number: int, side: int = 64) -> Graph:
    """A picture of its own text, as small as they come."""
    graph = graphs.load("ksampler_dev")
    graph = graphs.with_values(graph, seed=number, size=(side, side), steps=NUM_STEPS)
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = f"prompt {number}"
    return graph


class Work:
    """A server on two cards, and what everybody has on them."""

    def __init__(self, server: Server, ledger: Ledger) -> None:
        self.server, self.ledger = server, ledger
        self.number = 0

    def make(self, change: Callable[[Graph], Graph] = lambda graph: graph) -> dict[str, Any]:
        """Make a picture, all of its steps parallel; return the status after it."""
        self.number += 1
        before = self.server.status()
        self.server.run(change(prompt(self.number)), DEADLINE_S)
        status = self.server.status()
        assert (
            status["totals"]["steps_parallel"] - before["totals"]["steps_parallel"] == NUM_STEPS
        ), status["last_run"]
        assert status["totals"]["steps_fell_back"] == before["totals"]["steps_fell_back"]
        assert "out of memory" not in self.server.log_text()
        return status

    def on_card(self, card: int) -> tuple[int, int]:
        """Bytes that ComfyUI, and that the rank of a card has there."""
        assert self.server.process is not None
        found = self.ledger.by_process(card)
        rank = self.server.status()["ranks"][card]["pid"]
        return found.get(self.server.process.pid, 0), found.get(rank, 0)


@contextmanager
def working(
    tree: Tree,
    path: Path,
    gib: float,
    *arguments: str,
    mode: dict[str, str] = STRICT,
    models: Path | None = None,
    node_packs: Sequence[Path] = (),
) -> Iterator[Work]:
    cards = f"4090:{gib},4090:{gib}"
    env = {"XDIT_GPUS": "0,1", "XDIT_STRATEGY": "ulysses", "EMULATED_CARDS": cards, **mode}
    around = ("--fp32-vae", "--fp32-text-enc")
    with (
        base_directory(path / "base", models or models_directory(SIZES)) as base,
        Server(
            tree,
            base,
            env=env,
            device="emulated",
            extra_args=(*around, *arguments),
            node_packs=node_packs,
        ) as server,
    ):
        yield Work(server, Ledger(base / LEDGER))


def planned_bytes(status: dict[str, Any]) -> int:
    """What the plan counts on the card where it is tightest, to 50 MiB."""
    gib = re.search(r": ([0-9.]+) of [0-9.]+ GiB on rank 0", status["residency"][0])
    assert gib is not None, status["residency"]
    return int(float(gib[1]) * (1 << 30))


def test_cards_with_room_for_both_hold_what_is_planned_and_nothing_is_read_twice(
    tree: Tree, tmp_path: Path, record_property: Record
) -> None:
    with working(tree, tmp_path, 4) as work:
        assert [work.ledger.used(card) for card in (0, 1)] == [CONTEXT, CONTEXT], "of ComfyUI"
        status = work.make()
        weights = status["ranks"][0]["weight_bytes"]
        ranks = [work.on_card(card)[1] for card in (0, 1)]
        for card, on_card in enumerate(ranks):
            assert on_card >= CONTEXT + GROUP + weights
            planned = planned_bytes(status) - RESERVE - CONTEXT  # ComfyUI's is not the rank's
            error = abs(on_card - planned) / planned
            record_property(f"card {card}, planned and held", (planned // MIB, on_card // MIB))
            assert error < 0.1, f"{planned // MIB} MiB planned, {on_card // MIB} held"
        for change in (lambda graph: graph, lambda graph: with_loras(graph, (KOHYA, 1.0))):
            status = work.make(change)
        assert (status["totals"]["gave_way"], status["totals"]["loads"]) == (0, 1), (
            "there is room for all"
        )
        assert [work.on_card(card)[1] for card in (0, 1)] == pytest.approx(ranks, rel=0.1)
        host, _ = work.on_card(0)
        assert host < CONTEXT + weights, "ComfyUI's own copy of the model is not on the card"
        work.server.free_until(
            lambda: max(work.on_card(card)[1] for card in (0, 1)) < CONTEXT + GROUP + 16 * MIB,
            DEADLINE_S,
            "Free: the ranks have more than context, communicator and arguments of the last call.",
        )


@pytest.mark.thorough
def test_ranks_that_nobody_uses_leave_nothing_on_the_cards_and_come_back(
    tree: Tree, tmp_path: Path
) -> None:
    with working(tree, tmp_path, 4, mode={**STRICT, "XDIT_IDLE_TIMEOUT": "2"}) as work:
        assert work.server.process is not None
        for _ in range(2):
            held = work.make()["ranks"][0]["weight_bytes"]
            assert min(work.on_card(card)[1] for card in (0, 1)) > CONTEXT + held
            end = time.monotonic() + DEADLINE_S
            while any(set(work.ledger.by_process(c)) != {work.server.process.pid} for c in (0, 1)):
                assert time.monotonic() < end, "the ranks have something on the cards"
                time.sleep(0.1)
            assert work.server.status()["state"] == "idle"


@pytest.mark.thorough
def test_on_cards_without_room_for_both_the_rank_leaves_and_returns(
    tree: Tree, tmp_path: Path
) -> None:
    with working(tree, tmp_path, 2.5) as work:
        for _ in range(2):
            status = work.make()
        assert status["totals"]["gave_way"] > 0
        assert status["totals"]["loads"] == 1, "it returns from the file's own pages"
        assert work.ledger.peak(0) <= 2.5 * (1 << 30)


def driven(number: int, side: int = 64) -> Graph:
    """The blocks run on the ranks, and the rest of the forward in ComfyUI."""
    graph = FEATURES["unknown post_input patch"].graph()
    return graphs.with_values(graph, seed=number, size=(side, side), steps=NUM_STEPS)


def controlled(number: int, side: int = 64) -> Graph:
    graph = FEATURES["InstantX"].graph()
    return graphs.with_values(graph, seed=number, size=(side, side), steps=NUM_STEPS)


@pytest.mark.thorough
@pytest.mark.parametrize("graph", [prompt, driven, controlled])
def test_a_call_without_room_on_a_card_costs_no_rank(
    tree: Tree, tmp_path: Path, graph: Callable[..., Graph]
) -> None:
    """Another program takes what is left of a card. A call of a size that was made goes on."""
    lenient = {"XDIT_START_TIMEOUT": STRICT["XDIT_START_TIMEOUT"], "XDIT_START": "first"}
    common = {} if graph is prompt else {"models": feature_models(), "node_packs": COMMON_PACKS}
    with working(tree, tmp_path, 4, mode=lenient, **common) as work:
        write_inputs(work.server)

        def make(number: int, side: int = 64) -> dict[str, Any]:
            work.server.run(graph(number, side), DEADLINE_S)
            return work.server.status()

        def parallel(status: dict[str, Any]) -> int:
            assert status["last_run"]["fall_back_reasons"] == {}, status["last_error"]
            return status["last_run"]["steps_parallel"]

        status = make(1)
        assert parallel(status) == NUM_STEPS
        pids = [rank["pid"] for rank in status["ranks"]]
        # What the host sends for a call comes beside what it sent for the one before.
        left = (4 << 30) - work.ledger.used(1) - 2 * MIB
        assert work.ledger.take(1, left, 4 << 30)
        assert parallel(make(2)) == NUM_STEPS
        status = make(50, side=512)
        reasons = {"the cards have no room for this call beside the weights": NUM_STEPS}
        assert status["last_run"]["fall_back_reasons"] == reasons
        assert status["last_error"]["text"].startswith("Ranks [1] have no ")
        alone = counted(status["controls_alone"])
        reason = "the cards have no room for its call beside the weights"
        # For the rest of the run the model is ComfyUI's alone, and so are its ControlNets.
        assert alone == ({reason: 1} if graph is controlled else {})
        work.ledger.give_back(1, left)
        status = make(51, side=512)
        assert parallel(status) == NUM_STEPS
        assert counted(status["controls_alone"]) == alone
        assert [rank["pid"] for rank in status["ranks"]] == pids, "none was lost"


@pytest.mark.thorough
@pytest.mark.skipif("EMULATED_ALL" not in os.environ, reason="most of an hour: EMULATED_ALL=1")
@pytest.mark.parametrize("gib", [4, 2.5])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--disable-dynamic-vram",),
        ("--disable-dynamic-vram", "--lowvram"),
        ("--highvram",),
        ("--novram",),
        ("--reserve-vram", "0.7"),
        ("--disable-smart-memory",),
    ],
    ids=" ".join,
)
def test_every_way_to_use_memory_is_parallel_and_runs_out_of_none(
    tree: Tree,
    tmp_path: Path,
    arguments: tuple[str, ...],
    gib: float,
    record_property: Record,
) -> None:
    with working(tree, tmp_path, gib, *arguments) as work:

        def make(what: str, change: Callable[[Graph], Graph], num_loads: int) -> None:
            work.ledger.forget_peaks()
            status = work.make(change)
            held = [work.on_card(card)[1] // MIB for card in (0, 1)]
            peaks = [work.ledger.peak(card) // MIB for card in (0, 1)]
            planned = planned_bytes(status) // MIB
            ways = f"gave way {status['totals']['gave_way']}, loads {status['totals']['loads']}"
            record_property(what, f"planned {planned}, ranks {held}, peaks {peaks} MiB, {ways}")
            assert max(peaks) <= gib * 1024
            # Without smart memory ComfyUI unloads all models after each prompt, and so do ranks.
            all_loads = work.number if "--disable-smart-memory" in arguments else num_loads
            assert status["totals"]["loads"] == all_loads, "read again"

        make("first", lambda graph: graph, 1)
        make("another prompt", lambda graph: graph, 1)
        make("a LoRA", lambda graph: with_loras(graph, (KOHYA, 1.0)), 1)
        make("a second model", lambda graph: with_unet(graph, OTHER), 2)
        make("the first again", lambda graph: graph, 3)  # ComfyUI had dropped it as well.
        work.server.free_and_wait()
        make("after Free", lambda graph: graph, 4)


MODULATION = 2 * (SIZES.double * 12 + SIZES.single * 3) * SIZES.hidden * (SIZES.hidden + 1)
"""Bytes of what modulates the blocks, with its biases."""


def test_cards_too_small_for_a_whole_copy_share_the_modulation(
    tree: Tree, tmp_path: Path, record_property: Record
) -> None:
    """A whole copy would take more than there is, by less than a rank saves."""
    gib = 2.31
    with working(tree, tmp_path, gib) as work:
        for change in (lambda graph: graph, lambda graph: with_loras(graph, (KOHYA, 1.0))):
            work.ledger.forget_peaks()
            status = work.make(change)
            lines = status["residency"]
            assert lines[0].startswith("modulation shared over the ranks"), lines
            (turned_down,) = (line for line in lines if "does not fit" in line)
            assert "all weights on every card" in turned_down
            held = [rank["weight_bytes"] for rank in status["ranks"]]
            peaks = [work.ledger.peak(card) for card in (0, 1)]
            record_property("held, and the cards' peaks", (held, peaks))
            assert max(peaks) <= gib * (1 << 30)
            # On the first card ComfyUI decodes the image, and the rank there has given way.
            assert work.on_card(1)[1] >= CONTEXT + GROUP + held[1]
        file = load_file(models_directory(SIZES) / "diffusion_models" / "flux1-dev.safetensors")
        whole = sum(tensor.nbytes for tensor in file.values())
        assert held == [whole - MODULATION // 2] * 2


@pytest.mark.thorough
def test_fp8_weights_are_cast_once_and_take_what_is_planned(
    tree: Tree, tmp_path: Path, record_property: Record
) -> None:
    def fp8(graph: Graph) -> Graph:
        return with_unet(graph, "flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")

    file = load_file(models_directory(SIZES) / "diffusion_models" / "flux1-dev.safetensors")
    whole = sum(tensor.nbytes for tensor in file.values())
    named = {**STRICT, "XDIT_STRATEGY": "ulysses=2,modulation=2"}
    with working(tree, tmp_path, 4, mode=named) as work:
        for change in (fp8, lambda graph: with_loras(fp8(graph), (KOHYA, 1.0)), fp8):
            work.ledger.forget_peaks()
            status = work.make(change)
            assert status["residency"][0].startswith("weights cast once"), status["residency"]
            held = [rank["weight_bytes"] for rank in status["ranks"]]
            # But for the scales of norms, which stay as they are stored, all is bf16.
            assert held == pytest.approx([whole - MODULATION // 2] * 2, rel=1e-3)
            peaks = [work.ledger.peak(card) for card in (0, 1)]
            on_card, planned = work.on_card(1)[1], planned_bytes(status) - RESERVE - CONTEXT
            record_property("planned, held, peaks", (planned, on_card, held, peaks))
            assert max(peaks) <= 4 << 30
            assert abs(on_card - planned) / planned < 0.1
        assert status["totals"]["loads"] == 1, "it returns from the file's own pages"
