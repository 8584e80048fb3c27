"""A forward with sharded weights has the bits of the forward with whole weights.

Every rank computes the same tokens here, so that nothing but the weights can differ. The forward
is ComfyUI's own, in a ComfyUI process for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside.client import Inside
from rig.breadth import is_whole
from rig.trees import Tree, trees_for_tests

MAX_RANKS = 4
# Blocks as in FLUX.1: two kinds of one, few of the other; three widths of 128.
MODEL = {"hidden": 384, "double": 2, "single": 3}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"options": {"dtype": "float32"}},
    "bf16": {"options": {"dtype": "bfloat16"}},
    "fp8": {"options": {"dtype": "float8_e4m3fn"}},
    "bf16 with weight patches": {"options": {"dtype": "bfloat16"}, "lora": True},
    "mixed precision": {"options": {}, "mixed": True},
}


@pytest.fixture(scope="module")
def processes(tree: Tree) -> Iterator[list[Inside]]:
    """Stock ComfyUI processes, one for each rank."""
    running = [Inside(tree, {"XDIT_STRATEGY": "off"}) for _ in range(MAX_RANKS)]
    yield running
    for process in running:
        process.close()


def on_ranks(
    processes: list[Inside], body: str, world_size: int, store: Path, **kwargs: Any
) -> list[dict[str, Any]]:
    """Run a collective body in as many processes as there are ranks."""
    ranks = processes[:world_size]
    common = {"world_size": world_size, "store": str(store), **kwargs}
    for rank, process in enumerate(ranks):
        process.start_call(body, rank=rank, **common)
    # All answers are read before any is looked at, so that none is left for the next test.
    answers: list[dict[str, Any] | RuntimeError] = []
    for process in ranks:
        try:
            answers.append(process.finish_call())
        except RuntimeError as error:
            answers.append(error)
    results = []
    for answer in answers:
        if isinstance(answer, RuntimeError):
            raise answer
        results.append(answer)
    return results


def file_of(case: dict[str, Any], processes: list[Inside], path: str, tmp_path: Path) -> str:
    """Return the file of a case: this one, or one of mixed precision made of it."""
    if not case.pop("mixed", False):
        return path
    mixed = str(tmp_path / "mixed.safetensors")
    processes[0].call("sharding:write_mixed_precision", source=path, path=mixed)
    return mixed


@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_whole_bit_for_bit(
    tree: Tree,
    processes: list[Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    name: str,
) -> None:
    if tree != trees_for_tests()[-1] and name != "mixed precision":
        pytest.skip("only quantised tensors are of another class in the oldest")
    case = dict(CASES[name])
    path = file_of(case, processes, flux_dev(**MODEL), tmp_path)
    for world_size in (2, 3, 4) if is_whole() else (3,):
        store = tmp_path / f"store-{world_size}"
        results = on_ranks(processes, "sharding:compare", world_size, store, path=path, **case)
        for rank, result in enumerate(results):
            assert all(result["equal"].values()), (rank, result)
            assert len(result["equal"]) == 7
            assert len(set(result["size"])) == 4, "a block that is skipped must matter"
            assert min(result["size"]) > 0.1
        assert ("QuantizedTensor" in results[0]["kinds"]) == (name == "mixed precision")
        if name == "fp8":
            assert "torch.float8_e4m3fn" in results[0]["dtypes"]


@pytest.mark.newest_only
def test_a_rank_of_four_holds_its_share_and_gathers_the_rest(
    processes: list[Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    # Half as many blocks of each kind as FLUX.1 has, in its proportion of 1 to 2, at the width
    # where what is outside of the blocks has about FLUX.1's part of the weights.
    path = flux_dev(hidden=384, double=9, single=18)
    results = on_ranks(
        processes, "sharding:compare", 4, tmp_path / "store", path=path,
        options={"dtype": "bfloat16"},
    )  # fmt: skip
    for result in results:
        record_property("bytes", result)
        whole = result["whole"] + result["outside"]
        assert result["held"] + result["outside"] <= 0.30 * whole
        assert result["held"] * 4 >= result["whole"]
        # All units but the first, whose gather was started before the count.
        assert result["gathered"] == result["held"] * 3 - result["first"]
