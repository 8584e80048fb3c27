"""Every exact plan of 2 to 8 ranks against stock ComfyUI: the largest relative error in float32.

Run: PYTHONPATH=tests python tests/bench/parity.py [--ranks 2 3 4 5 6 8] [--only tensor]

Prints the table of ``docs/parity.md``: the plan, then the error of a forward of each kind of call,
``max |ranks - stock| / max |stock|``. ``refused`` is a call that the plan cannot share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.report import say
from rig.trees import trees_for_tests

from comfy_xdit_patch.planning.planner import legal_strategies

ODD = {"height": 9, "width": 13, "text_tokens": 77}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    # column: model, sizes of the call
    "FLUX.1": ("dev", {}),
    "Kontext": ("dev", {"refs": [[9, 9], [16, 8]]}),
    "ControlNet": ("dev", {"control": 20}),
    "mask": ("dev", {"mask": True}),
    "FLUX.2": ("flux2", {"refs": [[7, 9]], "ref_method": "index"}),
    "Chroma": ("chroma", {}),
}
SIZES = {"hidden": 1024, "double": 2, "single": 2}


def plans_of(num_ranks: int, only: str) -> list[str]:
    """The plans of so many ranks; a strategy's name stands for one of them."""
    plans = [text for text in legal_strategies(num_ranks) if "=" in text and only in text]
    return [text for text in plans if "pipefusion" not in text]  # which is approximate


def main() -> int:
    """Run it; return 1 if an error is above the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--only", default="", help="plans with this in their name")
    options = parser.parse_args()
    tree = trees_for_tests()[-1]
    stock = Inside(tree, {"XDIT_STRATEGY": "off"})
    worst = 0.0
    num_cases = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            tmp_path = Path(folder)
            paths = {}
            for model in {model for model, _ in CALLS.values()}:
                paths[model] = str(tmp_path / f"{model}.safetensors")
                stock.call(
                    "families:write_model", path=paths[model], family=model, context=64, **SIZES
                )
            say(f"ComfyUI {tree.version}\n")
            say(f"| ranks | plan | {' | '.join(CALLS)} |")
            say("|---|---|" + "---|" * len(CALLS))
            for num_ranks in options.ranks:
                ranks = Inside(tree, {"XDIT_GPUS": f"cpu:{num_ranks}", **STRICT})
                try:
                    for plan in plans_of(num_ranks, options.only):
                        cells = []
                        for model, sizes in CALLS.values():
                            batch = 2 * num_ranks if "batch" in plan else 1
                            try:
                                ranks.call("steering:use_strategy", text=plan)
                                error, _, _ = compare(
                                    stock,
                                    ranks,
                                    paths[model],
                                    tmp_path,
                                    **ODD,
                                    batch=batch,
                                    **sizes,
                                )
                            except RuntimeError as refusal:
                                if "cannot run in parallel" not in str(refusal):
                                    raise
                                cells.append("refused")
                                continue
                            worst = max(worst, error)
                            num_cases += 1
                            cells.append(f"{error:.1e}")
                        say(f"| {num_ranks} | `{plan}` | {' | '.join(cells)} |")
                finally:
                    ranks.close()
    finally:
        stock.close()
    say(f"\n{num_cases} forwards, the largest error {worst:.1e}, the bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
