"""Run one row on a stock server and on ranks, and say what became of its steps.

Runs in: the tests.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rig.compare import Difference, compare_all
from rig.environment import RigError
from rig.feature_graphs import MASK, OTHER_PICTURE, PICTURE
from rig.feature_rows import FALLS_BACK, GATHERED, NOT_HERE, PACKS, PARALLEL, REFUSED, UNSEEN, Row
from rig.pair import EQUAL, Bound, Result, latent_error, run, run_stock
from rig.server import Server
from rig.status_schema import counted

COMMON_PACKS = (
    PACKS.with_name("gguf_pack"),
    *sorted(path for path in PACKS.iterdir() if (path / "__init__.py").exists()),
)
"""Node packs that nearly all rows can have beside them."""
SIDE = 128
# In 16 bits, stock against stock with another of ComfyUI's attention functions (0.33.0, 128 x 128
# px, 2 steps, 4 heads, 12 seeds, three functions) differs by up to 6/255, 49.9 dB and 8.2e-3 of the
# latent; in the median by 3/255.
ROUNDED = Bound(max_pixel=6, min_psnr_db=50.0, max_latent_error=8e-3)


@dataclass(frozen=True)
class Found:
    """What became of a row; the figures are None where it is not in this version."""

    outcome: str
    reasons: dict[str, int]
    steps_parallel: int = 0
    steps_gathered: int = 0
    steps_fell_back: int = 0
    steps_skipped: int = 0
    gather_reasons: tuple[str, ...] = ()
    controls_parallel: int = 0
    controls_alone: tuple[str, ...] = ()
    max_pixel: int | None = None
    psnr_db: float | None = None
    latent_error: float | None = None

    def __str__(self) -> str:
        if self.max_pixel is None:
            return self.outcome
        steps = f"{self.steps_parallel} parallel, {self.steps_fell_back} not"
        return f"{self.outcome} ({steps}), max {self.max_pixel}/255, PSNR {self.psnr_db:.1f} dB"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ABSENT = Found(NOT_HERE, {})


def write_inputs(server: Server) -> None:
    """Put the pictures that graphs load where this server looks for them."""
    folder: Path = server.base_dir / "input"
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06).astype(float)
    stripes = (np.floor(8 * x + 3 * y) % 2).astype(float)
    pictures = {
        PICTURE: np.stack((disc, 0.7 * y, 0.3 + 0.5 * stripes), axis=-1),
        OTHER_PICTURE: np.stack((stripes * y, 1 - disc, x), axis=-1),
        MASK: np.repeat((((x - 0.5) ** 2 + (y - 0.4) ** 2) < 0.09)[..., None] * 1.0, 3, axis=-1),
    }
    for name, values in pictures.items():
        if not (folder / name).exists():
            Image.fromarray((255 * values).astype(np.uint8)).save(folder / name)


def run_row(stock: Server, ranks: Server, row: Row, bound: Bound | None = None) -> Found:
    """Run a row on both servers; an image that is not stock's is an AssertionError."""
    for server in (stock, ranks):
        write_inputs(server)
    if row.outcome == REFUSED:
        refusal(ranks, row)
        return Found(REFUSED, {})
    graph = row.graph()
    reference = run_stock(stock, graph)
    before = ranks.status()
    result = run(ranks, graph)
    after = ranks.status()
    bound = bound or (ROUNDED if row.is_rounded else EQUAL)
    return found(reference, result, before, after, bound)


def refusal(server: Server, row: Row) -> str:
    """Return ComfyUI's error; the graph must fail, and in these words."""
    try:
        run(server, row.graph())
    except RigError as error:
        first: str = str(error).splitlines()[0]
        assert row.reason in first, f"another error than {row.reason!r}: {first}"
        return first
    raise AssertionError("ComfyUI does not refuse this graph")


def found(
    reference: Result,
    result: Result,
    before: dict[str, Any],
    after: dict[str, Any],
    bound: Bound = EQUAL,
) -> Found:
    """Compare two results, and count what became of the steps between two reports."""

    def more(name: str) -> int:
        return int(after["totals"][name]) - int(before["totals"][name])

    parallel, gathered, fell, skipped = (
        more(f"steps_{name}") for name in ("parallel", "gathered", "fell_back", "skipped")
    )
    reasons = _more(counted(before["fell_back"]), counted(after["fell_back"]))
    difference = compare_all(reference.images, result.images)
    error = latent_error(reference.latents, result.latents)
    said = f"{parallel} steps parallel, fell back: {reasons}"
    check_equal(difference, error, bound, said)
    for old, new in zip(before["ranks"], after["ranks"], strict=True):
        forwards = new["forwards"] - old["forwards"]
        assert forwards == parallel, f"{parallel} steps parallel, but {forwards} forwards: {new}"
    return Found(
        outcome=outcome_of(parallel, gathered, fell),
        reasons=reasons,
        steps_parallel=parallel,
        steps_gathered=gathered,
        steps_fell_back=fell,
        steps_skipped=skipped,
        gather_reasons=tuple(after["last_run"].get("gather_reasons", ())) if gathered else (),
        controls_parallel=more("controls_parallel"),
        controls_alone=tuple(
            _more(counted(before["controls_alone"]), counted(after["controls_alone"]))
        ),
        max_pixel=difference.max_pixel,
        psnr_db=min(difference.psnr_db, 999.0),  # no infinity in JSON
        latent_error=error,
    )


def _more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Return what was counted between two reports, by reason."""
    added = {reason: number - before.get(reason, 0) for reason, number in after.items()}
    return {reason: number for reason, number in added.items() if number}


def outcome_of(parallel: int, gathered: int, fell_back: int) -> str:
    """Say in one word what became of steps; one that fell back counts for all."""
    if parallel + fell_back == 0:
        return UNSEEN
    return FALLS_BACK if fell_back else GATHERED if gathered else PARALLEL


def check_equal(difference: Difference, error: float, bound: Bound, said: str) -> None:
    """Hold the difference of two results to a bound."""
    is_equal = difference.max_pixel <= bound.max_pixel and difference.psnr_db >= bound.min_psnr_db
    assert is_equal, f"the image is not stock's: {difference}; {said}"
    assert error <= bound.max_latent_error, (
        f"the latent is not stock's: relative error {error:.1e}; {said}"
    )
