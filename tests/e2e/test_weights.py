"""Every way in which users load weights: parallel in strict mode, and equal to stock ComfyUI.

The rows stand in ``rig.weight_rows``. Strict mode also compares the weights themselves: the host's
patched weights and each rank's, bit for bit, counted in the status as ``totals.weights_verified``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig.breadth import sampled
from rig.compare import compare_all
from rig.environment import RigError
from rig.pair import EQUAL, NOISY, Pair, Result, run_pair, run_stock
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import GROUPS, PLAIN, ROWS, SETUP, Row, base_graph

# Correlation of the latents of two models that only differ in precision. The worst is 0.97, where a
# LoRA went into 4 bits; with the LoRA left out it is 0.91, with scales ignored 0.82.
CLOSE = 0.95
VISIBLE = 20  # of 255, for rows that change the picture
COMPLAINTS = ("lora key not loaded", "unet unexpected", "unet missing", "ERROR", "MISMATCH")

Servers = Callable[..., Server]
Record = Callable[[str, object], None]
Setup = dict[str, Any]


@pytest.mark.parametrize("group", GROUPS)
def test_stock_loads_every_row(
    servers: Servers, tree: Tree, group: str, record_property: Record
) -> None:
    check_stock(servers, tree, sample(group), record_property, SETUP)


@pytest.mark.parametrize("group", GROUPS)
# The outer loop: one start of each server.
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_every_row_equals_stock(
    servers: Servers, tree: Tree, num_ranks: int, group: str, record_property: Record
) -> None:
    if num_ranks > 2 and group not in ("LoRA", "GGUF"):
        pytest.skip("how weights arrive does not depend on the number of ranks: a part on 3")
    check_ranks(servers, tree, num_ranks, sample(group), record_property, SETUP)


def sample(group: str) -> dict[str, Row]:
    """Return every third row of a group; all of them with ``--all``."""
    return sampled(GROUPS[group], every=3)


def test_the_real_gguf_pack_equals_stock(
    servers: Servers, tree: Tree, record_property: Record
) -> None:
    pack = os.environ.get("COMFYUI_GGUF_PATH")
    if not pack:
        pytest.skip("COMFYUI_GGUF_PATH does not name a checkout of city96/ComfyUI-GGUF")
    setup = {**SETUP, "node_packs": (Path(pack),)}
    check_stock(servers, tree, GROUPS["GGUF"], record_property, setup)
    check_ranks(servers, tree, 2, GROUPS["GGUF"], record_property, setup)


def check_stock(
    servers: Servers, tree: Tree, rows: dict[str, Row], record: Record, setup: Setup
) -> None:
    """Stock ComfyUI loads every row completely, and the row shows in the image."""
    server = servers(tree, XDIT_STRATEGY="off", **setup)

    def check(row: Row) -> str:
        reference = run_stock(server, ROWS[row.close_to or PLAIN].graph(base_graph()))
        already_logged = len(server.log_text())
        result = run_stock(server, row.graph(base_graph()))
        log = server.log_text()[already_logged:]
        complaints = [line for line in log.splitlines() if any(c in line for c in COMPLAINTS)]
        assert not complaints, complaints[0]
        difference = compare_all(reference.images, result.images)
        closeness = correlation(reference, result)
        if row.close_to is None:
            assert difference.max_pixel >= VISIBLE, f"not visible in the image: {difference}"
        else:
            assert closeness >= CLOSE, f"not like {row.close_to}: correlation {closeness:.3f}"
        return f"{difference}, correlation {closeness:.3f}"

    check_rows(tree, rows, check, record)


def check_ranks(
    servers: Servers, tree: Tree, num_ranks: int, rows: dict[str, Row], record: Record, setup: Setup
) -> None:
    """Every row runs in parallel with the same bits of weight and makes stock's image."""

    def check(row: Row) -> str:
        bound = NOISY if row.noisy else EQUAL
        pair = run_pair(servers, tree, row.graph(base_graph()), num_ranks, bound=bound, **setup)
        num_verified = num_weights_verified(pair)
        assert num_verified > 0, "no weight was compared with the host's"
        return f"{pair.difference}, latent {pair.latent_error:.1e}, {num_verified} weights verified"

    check_rows(tree, rows, check, record)


def check_rows(
    tree: Tree, rows: dict[str, Row], check: Callable[[Row], str], record: Record
) -> None:
    """Check every row that this ComfyUI can load, and name all rows that fail."""
    failures = []
    for name, row in rows.items():
        if not row.runs_on(tree):
            record(name, f"ComfyUI {tree.version} does not know this format")
            continue
        try:
            record(name, check(row))
        except (AssertionError, RigError) as error:
            failures.append(f"{name}: {abridged(str(error))}")
    if failures:
        text = "\n".join(failures)
        pytest.fail(f"{len(failures)} of {len(rows)} rows failed:\n{text}", pytrace=False)


def abridged(text: str) -> str:
    """Return what failed, and the end of the traceback if there is one."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= 5 else [lines[0], "    ...", *lines[-4:]])


def num_weights_verified(pair: Pair) -> int:
    before, after = (status["totals"]["weights_verified"] for status in (pair.before, pair.after))
    return int(after) - int(before)


def correlation(one: Result, other: Result) -> float:
    a, b = (np.concatenate([x.ravel() for x in result.latents]) for result in (one, other))
    return float(np.corrcoef(a, b)[0, 1])
