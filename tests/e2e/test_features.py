"""Everything that graphs do with FLUX: the image is stock's, and the outcome is the written one.

The rows stand in ``rig.feature_table``. Rows that run in parallel do so in
strict mode; the others run without it, and their reason is asserted.

Every fifth row runs, and one for each reason to fall back. All of them run with ``--all``, and with
``FEATURES_RESULTS=FILE``, which keeps what was found: docs/compatibility.md is made of it.
``FEATURES_ROWS`` is a pattern that picks rows by name. ``FEATURES_SLOW=1`` runs those too that take
minutes (a compiler is in them). ``FEATURES_LENIENT=1`` leaves strict mode off, which shows why a
row falls back that should not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig.breadth import is_whole, one_of_each
from rig.compare import compare_all
from rig.environment import RigError
from rig.feature_graphs import SAMPLER, Draft
from rig.feature_models import feature_models
from rig.feature_rows import FALLS_BACK, GATHERED, PACKS, PARALLEL, REFUSED, Row, plain
from rig.feature_run import ABSENT, COMMON_PACKS, Found, refusal, run_row, write_inputs
from rig.feature_table import CONTROLS, SECTIONS
from rig.pair import DEADLINE_S, STRICT, Result, run_stock
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]
Record = Callable[[str, object], None]

COMPLAINTS = ("unet missing", "unet unexpected", "lora key not loaded", "missing controlnet keys")
MARK_OF_RADIANCE = "unexpected: ['__x0__']"  # a tensor without numbers, read by its name
EVERYTHING = is_whole() or "FEATURES_RESULTS" in os.environ
VISIBLE = 8  # of 255
SHARED = (PARALLEL, GATHERED)
LENIENT = {name: value for name, value in STRICT.items() if name != "XDIT_STRICT"}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_shows_in_stock_images(
    servers: Servers, tree: Tree, section: str, record_property: Record
) -> None:
    def check(row: Row) -> str:
        stock = server_for(servers, tree, row, XDIT_STRATEGY="off")
        write_inputs(stock)
        if row.outcome == REFUSED:
            return refusal(stock, row)
        already_logged = len(stock.log_text())
        result = run_stock(stock, row.graph())
        log = stock.log_text()[already_logged:].splitlines()
        complaints = [
            line
            for line in log
            if any(text in line for text in COMPLAINTS) and MARK_OF_RADIANCE not in line
        ]
        assert not complaints, complaints[0][:300]
        if row.same_as_plain:
            return row.same_as_plain
        reference = run_stock(stock, Row(plain, size=row.size, steps=row.steps).graph())
        if not comparable(reference, result):
            return "other images"
        difference = compare_all(reference.images, result.images)
        assert difference.max_pixel >= VISIBLE, f"not visible in the image: {difference}"
        return str(difference)

    # What a row shows in stock's image changes with ComfyUI and the row alone.
    check_rows(tree, rows_of(section, every=24), check, record_property)


# All sections of the one, then of the other: strict mode needs other ranks.
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_parallel_rows_are_parallel(
    servers: Servers, tree: Tree, num_ranks: int, section: str, record_property: Record
) -> None:
    check_ranks(servers, tree, num_ranks, section, record_property, is_strict=True)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_other_rows_become_what_is_written(
    servers: Servers, tree: Tree, num_ranks: int, section: str, record_property: Record
) -> None:
    check_ranks(servers, tree, num_ranks, section, record_property, is_strict=False)


def test_a_prompt_has_one_line_and_what_was_muted_is_said_after_it(
    servers: Servers, tree: Tree
) -> None:
    def tiled(draft: Draft) -> None:
        draft.nodes[SAMPLER]["class_type"] = "RigTiledSampler"

    def counted(draft: Draft) -> None:
        tiled(draft)
        draft.model("RigCountingAttention")

    ranks = server_for(servers, tree, Row(plain), XDIT_GPUS="cpu:2", **LENIENT)
    for change, lines in (
        (tiled, ["xDiT: 4 steps of 2 sampling runs on 2 CPU ranks (ulysses=2), 0 fell back"]),
        (
            counted,
            [
                "xDiT: 4 steps of 2 sampling runs on one GPU (a node overrides the attention",
                "xDiT: running on one GPU as ComfyUI does: a node overrides the attention function"
                " by tiled_sampling.CountingAttention.change.counted",
            ],
        ),
    ):
        already_logged = len(ranks.log_text())
        ranks.run(Row(change).graph(), DEADLINE_S)
        said = [line for line in ranks.log_text()[already_logged:].splitlines() if "xDiT: " in line]
        said = [line[line.index("xDiT: ") :] for line in said]
        said = [
            line for line in said if not line.startswith(("xDiT: model loaded", "xDiT: starting"))
        ]
        assert len(said) == len(lines), said
        assert all(line.startswith(start) for line, start in zip(said, lines, strict=True)), said


def check_ranks(
    servers: Servers, tree: Tree, num_ranks: int, section: str, record: Record, is_strict: bool
) -> None:
    """Every row becomes what is written; those that are parallel, in strict mode."""
    mode = STRICT if is_strict and "FEATURES_LENIENT" not in os.environ else LENIENT

    def check(row: Row) -> str:
        stock = server_for(servers, tree, row, XDIT_STRATEGY="off")
        ranks = server_for(servers, tree, row, XDIT_GPUS=f"cpu:{num_ranks}", **mode)
        found = run_row(stock, ranks, row)
        keep_result(tree, num_ranks, section, row, found)
        assert found.outcome == row.outcome, f"{found} instead of {row.outcome}: {found.reasons}"
        if row.outcome == FALLS_BACK:
            wrong = [reason for reason in found.reasons if row.reason not in reason]
            assert not wrong, f"other reasons than {row.reason!r}: {wrong}"
        alone = "; ".join(found.controls_alone)
        assert bool(alone) == bool(row.control_alone), f"a ControlNet ran alone: {alone!r}"
        assert row.control_alone in alone
        assert section != CONTROLS or alone or found.controls_parallel, "no ControlNet was counted"
        return str(found)

    rows = rows_of(section, every=10)
    rows = {name: row for name, row in rows.items() if (row.outcome in SHARED) == is_strict}
    for row in rows.values():
        if not row.runs_on(tree):
            keep_result(tree, num_ranks, section, row, ABSENT)
    check_rows(tree, rows, check, record)


def rows_of(section: str, *, every: int) -> dict[str, Row]:
    """Return the rows of a section that were asked for; those that share a server side by side.

    Without a choice: every how many-th row, and one for each reason to fall back in ComfyUI's
    common process. All rows take an hour.
    """
    rows = SECTIONS[section]
    if chosen := os.environ.get("FEATURES_ROWS", ""):
        rows = {name: row for name, row in rows.items() if re.search(chosen, name)}
    elif not EVERYTHING:
        kinds = one_of_each(
            {name: row for name, row in rows.items() if row.pack is None},
            lambda row: (row.outcome, row.reason, row.control_alone),
        )
        rows = {**dict(list(rows.items())[::every]), **kinds}
    return dict(sorted(rows.items(), key=lambda item: item[1].pack or ""))


def server_for(servers: Servers, tree: Tree, row: Row, **env: str) -> Server:
    packs = COMMON_PACKS if row.pack is None else (PACKS / "alone" / row.pack,)
    return servers(tree, models=feature_models(), node_packs=packs, **env)


def check_rows(
    tree: Tree, rows: dict[str, Row], check: Callable[[Row], str], record: Record
) -> None:
    """Check every row that this ComfyUI has, and name all rows that fail."""
    failures = []
    for name, row in rows.items():
        if row.is_slow and not os.environ.get("FEATURES_SLOW"):
            record(name, "not run without FEATURES_SLOW=1")
            continue
        if not row.runs_on(tree):
            record(name, f"ComfyUI {tree.version} has no such thing")
            continue
        try:
            record(name, check(row))
        except (AssertionError, RigError) as error:
            failures.append(f"{name}: {abridged(str(error))}")
    if failures:
        text = "\n".join(failures)
        pytest.fail(f"{len(failures)} of {len(rows)} rows failed:\n{text}", pytrace=False)


def comparable(reference: Result, result: Result) -> bool:
    shapes = [[image.shape for image in images] for images in (reference.images, result.images)]
    return shapes[0] == shapes[1]


def abridged(text: str) -> str:
    """Return what failed, and the end of the traceback if there is one."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= 6 else [lines[0], "    ...", *lines[-5:]])


def keep_result(tree: Tree, num_ranks: int, section: str, row: Row, found: Found) -> None:
    """Add what was found to the file that FEATURES_RESULTS names."""
    path = os.environ.get("FEATURES_RESULTS")
    if not path:
        return
    file = Path(path)
    old: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    name = next(name for name, other in SECTIONS[section].items() if other is row)
    entry = old.setdefault(section, {}).setdefault(name, {"why": "", "found": {}})
    entry |= {"why": row.why, "is_rounded": row.is_rounded}
    entry["found"].setdefault(tree.version, {})[str(num_ranks)] = found.to_dict()
    # In the table's order, without rows that it does not have any more.
    results = {
        title: {name: old[title][name] for name in rows if name in old[title]}
        for title, rows in SECTIONS.items()
        if title in old
    }
    file.write_text(json.dumps(results, indent=1) + "\n")
