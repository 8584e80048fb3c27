"""What somebody changes for the whole of ComfyUI's process: followed or refused, never unseen.

The changes are made of what a step of stock ComfyUI calls (``inside/mutations.py``); those that
change stock's result count. Each is made in stock and with two CPU ranks, while the ranks run; and
all at once, before new ranks start.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inside.client import Inside
from rig.breadth import how_many
from rig.trees import Tree

RANKS = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"}
Record = Callable[[str, object], None]
EQUAL = 1e-5
"""Relative error in float32."""
CHANGED = 1e-4
EQUAL_IN_BFLOAT16 = 6e-3
"""Rounding in an autocast to bfloat16, whose step is 7.8e-3, where shards are summed otherwise."""
MECHANISMS = 6
MOST_PER_STEP_MS = 0.2
FOLLOWED = ("default_dtype", "autocast", "matmul_precision")
REASONS = {
    "setting operator": "torch's operator aten/scaled_dot_product_attention",
    "setting function_mode": "mutations._Scaling is active around the sampling",
}


class Changes:
    """What alters stock's result, and by how much."""

    def __init__(self, stock: Inside, ranks: Inside, path: str, folder: Path) -> None:
        self.stock, self.ranks, self.path, self.folder = stock, ranks, path, folder
        self.plain = self.call(stock, "plain_call")[1]

    def call(self, process: Inside, body: str, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        out = self.folder / "out.pt"
        out.unlink(missing_ok=True)
        where = "host_checks" if body == "plain_call" else "mutations"
        counts = process.call(f"{where}:{body}", path=self.path, out=str(out), **kwargs)
        return counts, torch.load(out) if out.exists() else None

    def altering(self, most: int) -> dict[str, torch.Tensor]:
        """Mutations that change stock's result, with what it is then."""
        found: dict[str, torch.Tensor] = {}
        for mutation in self.stock.call("mutations:traced", path=self.path):
            _, result = self.call(self.stock, "mutated_call", mutation=mutation)
            if result is not None and error(result, self.plain) > CHANGED:
                found[mutation] = result
            if len(found) == most:
                break
        return found


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.fixture
def changes(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> Changes:
    stock = inside(tree, XDIT_STRATEGY="off")
    return Changes(stock, inside(tree, **RANKS), flux_dev(hidden=512), tmp_path)


def reason_of(mutation: str) -> str:
    kind, _, where = mutation.rpartition(" ")
    if kind == "attribute":
        name = re.sub(r"\.\d+\b", ".N", where).replace(":", ".")
        return f"a node set {name.strip('.')} of this model"
    return REASONS.get(mutation, f"{where.replace(':', '.')} was replaced by ")


def test_whatever_is_changed_for_the_whole_process_is_followed_or_refused(
    changes: Changes, record_property: Record
) -> None:
    altering = changes.altering(how_many(14, whole=100))
    assert len({mutation.rpartition(" ")[0] for mutation in altering}) >= MECHANISMS
    assert len(altering) >= how_many(14, whole=60)
    record_property("mutations", list(altering))
    wrong = {}
    for mutation, expected in altering.items():
        counts, result = changes.call(changes.ranks, "mutated_call", mutation=mutation)
        bound = EQUAL_IN_BFLOAT16 if mutation == "setting autocast" else EQUAL
        found = error(result, expected)
        reasons = list(counts["fell_back"])
        is_named = all(reason_of(mutation) in reason for reason in reasons)
        is_followed = mutation.rpartition(" ")[2] in FOLLOWED
        if not found <= bound or not is_named or (is_followed and reasons):
            wrong[mutation] = found, counts
        counts, result = changes.call(changes.ranks, "plain_call")
        if counts != {"parallel": 1, "fell_back": {}} or error(result, changes.plain) > EQUAL:
            wrong[f"after {mutation}"] = error(result, changes.plain), counts
    assert wrong == {}, list(wrong)
    cost, _ = changes.call(changes.ranks, "cost_of_looking")
    record_property("milliseconds", cost)
    assert cost["before a step"] < MOST_PER_STEP_MS, cost
    # As packs do at their import: before ranks start. What replaces the way in runs here.
    ways_in = {f"method comfy.ldm.flux.model:Flux.{name}" for name in ("forward", "_forward")}
    of_others = ("setting", "attribute")
    named = [one for one in altering if not (one.startswith(of_others) or one in ways_in)]
    changes.ranks.have(
        {**RANKS, "RIG_FAULTS": changes.ranks.env["RIG_FAULTS"], "XDIT_STEP_TIMEOUT": "599"}
    )
    counts, _ = changes.call(changes.ranks, "differences", mutations=named)
    assert counts["parallel"] == 0
    unseen = [m for m in named if not any(reason_of(m) in reason for reason in counts["names"])]
    assert unseen == []


IN_A_RUN = {
    "builtin torch.nn.functional:scaled_dot_product_attention": {
        "torch.nn.functional.scaled_dot_product_attention was replaced by "
        "mutations._scaling.scaling": 2
    },
    "setting autocast": {"settings of torch or ComfyUI were changed in the middle of a run": 1},
}


@pytest.mark.parametrize("mutation", IN_A_RUN)
def test_what_is_changed_in_a_run_costs_the_step_in_which_it_is_found(
    changes: Changes, mutation: str
) -> None:
    """Ranks have computed that step with what was there before: ComfyUI computes it again."""
    _, expected = changes.call(changes.stock, "changed_in_a_run", mutation=mutation)
    assert error(expected[1], expected[0]) > CHANGED
    counts, result = changes.call(changes.ranks, "changed_in_a_run", mutation=mutation)
    fell_back = IN_A_RUN[mutation]
    assert counts == {"parallel": 3 - sum(fell_back.values()), "fell_back": fell_back}
    bound = EQUAL_IN_BFLOAT16 if mutation == "setting autocast" else EQUAL
    assert error(result, expected) <= bound
