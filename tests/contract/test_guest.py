"""ComfyUI with us in it: what we leave alone, what we refuse, and what happens when we are wrong.

Every case runs in a real ComfyUI process with two CPU ranks, and compares with stock ComfyUI in
another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inside.client import Inside
from rig.trees import Tree
from rig.warm import THREADS, start

RANKS = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"}

REFUSED = {
    "block class": "a node replaced a block of this model by host_checks.OtherBlock",
    "block method": (
        "comfy.ldm.flux.layers.SingleStreamBlock.forward was replaced by "
        "host_checks._passing_on.passing_on"
    ),
    "attention function": "comfy.ldm.flux.layers.attention was replaced by "
    "host_checks._passing_on.passing_on",
    "optimized attention": "comfy.ldm.flux.math.optimized_attention was replaced by "
    "host_checks._passing_on.passing_on",
    "number of a block": "a node set double_blocks.N.img_norm1.eps of this model",
    "multigpu": "ComfyUI's own MultiGPU split is active",
}
# What lies around the blocks, or can be carried: the workers compute the blocks all the same.
SHARED = (
    *("forward_orig", "module hook", "attention override", "block patch"),
    "number around the blocks",
)


class Pair:
    """The same body in stock ComfyUI and with ranks."""

    def __init__(self, stock: Inside, ranks: Inside, path: str, tmp_path: Path) -> None:
        self.stock, self.ranks = stock, ranks
        self.path, self.tmp = path, tmp_path

    def call(self, body: str, **kwargs: object) -> tuple[float, dict[str, object]]:
        """Run a body with ranks and its plain twin in stock; return the error and the counts."""
        stock_body = body if body == "disturbed_call" else "plain_call"
        stock_kwargs = kwargs if body == "disturbed_call" else {}
        outs = [str(self.tmp / name) for name in ("stock.pt", "ranks.pt")]
        self.stock.call(f"host_checks:{stock_body}", path=self.path, out=outs[0], **stock_kwargs)
        counts = self.ranks.call(f"host_checks:{body}", path=self.path, out=outs[1], **kwargs)
        expected, got = (torch.load(out) for out in outs)
        return ((got - expected).abs().max() / expected.abs().max()).item(), counts


@pytest.fixture
def pair(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
) -> Pair:
    stock = inside(tree, XDIT_STRATEGY="off")
    return Pair(stock, inside(tree, **RANKS), flux_dev(hidden=512), tmp_path)


def test_switched_off_nothing_of_ours_is_in_the_process(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    found = stock.call("host_checks:ours_in_process")
    assert set(found["points"].values()) == {"function"}
    assert not found["activation_imported"]
    assert not found["finder"]


def test_every_patch_point_is_wrapped_once_and_fits(pair: Pair) -> None:
    found = pair.ranks.call("host_checks:ours_in_process")
    assert set(found["points"].values()) == {"FunctionWrapper"}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_node_pack_changed_is_refused_and_gives_the_stock_result(
    pair: Pair, kind: str
) -> None:
    error, counts = pair.call("disturbed_call", kind=kind)
    assert counts == {"parallel": 0, "fell_back": {REFUSED[kind]: 1}}
    assert error == 0
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}, "parallel again when it is taken back"
    assert error <= 1e-5


@pytest.mark.parametrize("kind", SHARED)
def test_what_a_node_put_around_the_blocks_leaves_them_to_the_ranks(pair: Pair, kind: str) -> None:
    error, counts = pair.call("disturbed_call", kind=kind)
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5


WAYS_IN = {
    "forward of a subclass": 1,
    "_forward of a subclass": 1,
    "forward_orig of a subclass": 1,
    "subclass with nothing of its own": 1,
    "forward of the class": 1,
    "forward of the object": 1,
    "forward that calls ComfyUI's twice": 2,
    "module around the blocks": 1,
    "layer around the blocks": 1,
    "object patch around the blocks": 1,
}


@pytest.mark.parametrize("kind", WAYS_IN)
def test_a_call_is_seen_whatever_lies_before_the_blocks_and_they_run_on_the_ranks(
    pair: Pair, kind: str
) -> None:
    error, counts = pair.call("disturbed_call", kind=kind)
    assert counts == {"parallel": WAYS_IN[kind], "fell_back": {}}
    assert error <= 1e-5
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5


def test_a_run_whose_calls_do_not_come_through_comfyuis_is_counted(pair: Pair) -> None:
    found = pair.ranks.call("host_checks:direct_call", path=pair.path, kind="blocks")
    assert found == ["a node calls FLUX's blocks itself: host_checks.direct_call.calling"]
    found = pair.ranks.call("host_checks:direct_call", path=pair.path, kind="nothing")
    assert found == ["FLUX was sampled, and none of its calls came here"]


def test_a_nodes_own_error_is_its_own(pair: Pair) -> None:
    """Not a fault of ours; and what has met nothing of ours is not run a second time."""
    out = str(pair.tmp / "none.pt")

    def call(is_given_tokens: bool) -> dict[str, object]:
        found: dict[str, object] = pair.ranks.call(
            "host_checks:failing_call", path=pair.path, out=out, is_given_tokens=is_given_tokens
        )
        assert found.pop("raised") == '"of the pack\'s own"'
        return found

    assert call(False) == {"times": 1, "fell_back": []}
    assert call(True) == {"times": 2, "fell_back": []}


@pytest.mark.parametrize("kind", ["lora", "edited weight"])
def test_changed_weights_are_carried_and_back_again(pair: Pair, kind: str) -> None:
    error, counts = pair.call("disturbed_call", kind=kind)
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5, "the workers went back to the weights before"


def test_a_restored_object_patch_is_not_mistaken_for_a_replaced_method(pair: Pair) -> None:
    error, counts = pair.call("disturbed_call", kind="forward_orig restored")
    assert counts == {"parallel": 1, "fell_back": {}}
    assert error <= 1e-5


def test_any_fault_of_ours_costs_no_image(pair: Pair) -> None:
    import ast

    source = (Path(__file__).parents[1] / "inside" / "host_checks.py").read_text()
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "HOST_FUNCTIONS"
    )
    for where in names:
        error, counts = pair.call("planted_call", where=where)
        assert counts["planted"] >= 1, f"{where} was not reached"
        # Without the run's bookkeeping a call is still parallel; without anything else it is not.
        is_parallel = where.endswith(("Host.begin_run", "Host.end_run"))
        assert counts["parallel"] == is_parallel, where
        assert error <= (1e-5 if is_parallel else 0), where
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}, "the next call is parallel again"


def test_any_fault_of_auto_costs_no_image(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
) -> None:
    ranks = inside(tree, XDIT_STRATEGY="auto", **RANKS)
    pair = Pair(inside(tree, XDIT_STRATEGY="off"), ranks, flux_dev(hidden=512), tmp_path)
    for where in (
        "comfy_xdit_patch.host.step.call_plans:candidates",
        "comfy_xdit_patch.host.weights.residency:Residency.is_resident",
        "comfy_xdit_patch.host.pace.auto:Auto.turn",
        "comfy_xdit_patch.host.pace.auto:machine_text",
        "comfy_xdit_patch.host.pace.auto:VerdictStore.find",
    ):
        error, counts = pair.call("planted_call", where=where)
        assert counts["planted"] == 1, f"{where} was not reached"
        assert (counts["parallel"], error) == (0, 0), where
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}, "the next call is parallel again"


def test_a_file_that_changed_after_comfyui_read_it_is_carried(pair: Pair) -> None:
    error, counts = pair.call("changed_file_call")
    assert error <= 1e-5
    assert (counts["parallel"], counts["fell_back"]) == (1, {})
    assert counts["state"] == "ready"
    error, counts = pair.call("plain_call")
    assert counts == {"parallel": 1, "fell_back": {}}


def test_a_wrapper_that_somebody_put_on_top_stays_when_we_are_switched_off(pair: Pair) -> None:
    error, counts = pair.call("wrapped_on_top")
    assert counts["theirs"] == 3
    assert [counts[when]["parallel"] for when in ("on", "off", "again")] == [1, 0, 1]
    assert error <= 1e-5


def test_a_compiled_model_is_still_computed_by_the_ranks(pair: Pair) -> None:
    error, counts = pair.call("compiled_call")
    assert counts["parallel"] == 1, counts
    assert error <= 1e-5


IMPORT_ORDERS = (
    "import comfy.sd, comfy.samplers",
    "import comfy.samplers, comfy.sd",
    "import comfy.ldm.flux.model; import comfy.sample; import comfy.sd",
    "import nodes",
)


@pytest.mark.newest_only
@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_the_patch_is_active_in_every_import_order(tree: Tree, tmp_path: Path, order: str) -> None:
    script = tmp_path / "order.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.'); sys.argv = ['main.py', '--cpu']\n"
        "import comfy.options; comfy.options.enable_args_parsing()\n"
        f"{order}\n"
        "from comfy_xdit_patch.host.guest.activation import ACTIVATION\n"
        "assert ACTIVATION.sampling.active"
    )
    with (tmp_path / "log").open("w+b") as log:
        process = start(
            [str(script)],
            folder=tree.path,
            environment={**os.environ, **THREADS, "XDIT_GPUS": "cpu:2"},
            stdin=log.fileno(),
            output=log.fileno(),
        )
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-2000:]
