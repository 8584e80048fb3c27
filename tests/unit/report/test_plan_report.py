"""``comfy-xdit plan``: its table, and what it says to bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_xdit_patch.__main__ import main
from comfy_xdit_patch.planning.cost.known_machines import CARDS
from comfy_xdit_patch.planning.cost.known_models import MODELS
from comfy_xdit_patch.report.plan_report import NUM_ROWS

REPO = Path(__file__).resolve().parents[3]


def plan(capsys, *arguments):
    """Return exit status, output and error output."""
    status = main(["plan", *arguments])
    done = capsys.readouterr()
    return status, done.out, done.err


def rows(out):
    """The table's rows by the plan's name."""
    lines = out.split("\n\n")[1].splitlines()
    assert lines[0].split()[0] == "plan"
    return {line.split()[0]: line for line in lines[1:]}


def test_the_table_is_projected_and_says_what_is_taken(capsys):
    status, out, err = plan(capsys, "--gpus", "4xl20")
    assert (status, err) == (0, "")
    assert out.startswith("Projected from a model of cost: nothing here was measured")
    assert "machine  4xl20, 1 socket(s); links: PCIe peer-to-peer" in out
    assert "1 row(s) of 4096 image, 256 text and 0 reference tokens" in out
    assert "rates    l20 fitted" in out
    assert "<- taken" in rows(out)["ulysses=4"]
    assert out.rstrip().endswith(
        "auto takes ulysses=4: 3.32x of one GPU; 12% of it is communication."
    )
    _, out, _ = plan(capsys, "--gpus", "4xl20", "--without", "overlap")
    assert "auto takes ulysses=4: 2.85x of one GPU; 24% of it is communication." in out
    _, out, _ = plan(capsys, "--gpus", "8xh100", "--graphs")
    assert "flux1-dev, bf16, eager, CUDA graphs" in out
    assert "auto takes ulysses=8: 6.07x of one GPU; 12% of it is communication." in out


def test_transfers_in_8_bits_are_called_approximate_where_heads_are_exchanged(capsys):
    says = "Transfers in int8 are an approximation (XDIT_TRANSFER_DTYPE=int8)."
    _, out, _ = plan(capsys, "--gpus", "4x4090", "--transfer-dtype", "int8")
    assert "auto takes ulysses=4,modulation=4: 2.89x of one GPU" in out
    assert out.rstrip().endswith(says)
    _, out, _ = plan(capsys, "--gpus", "1x4090", "--transfer-dtype", "int8")
    assert says not in out


def test_rows_are_the_fastest_plans_and_one_gpu(capsys):
    _, out, _ = plan(capsys, "--gpus", "8xh100", "--compiled")
    table = rows(out)
    assert len(table) == NUM_ROWS + 1
    times = [float(line.split()[2]) for line in table.values()]
    assert times == sorted(times)
    assert "1.00x" in table["single"]
    assert "slower plans are not shown" in out


def test_all_shows_every_plan_and_why_others_were_dropped(capsys):
    _, out, _ = plan(capsys, "--gpus", "2x4090", "--all")
    assert re.search(r"ulysses=2: does not fit: all weights on every card: [\d.]+ of 24.0 GiB", out)
    assert "  batch=2: batch=2 needs as many rows, and there are 1" in out
    assert "not shown" not in out


def test_approximate_plans_are_marked_and_taken_by_name_only(capsys):
    machine = ("--gpus", "8x4090", "--precision", "fp8-compute")
    _, auto, _ = plan(capsys, *machine)
    assert "approximate, by name only" in rows(auto)["pipefusion=8"]
    assert "taken" not in rows(auto)["pipefusion=8"]
    _, named, _ = plan(capsys, *machine, "--strategy", "pipefusion")
    assert "<- taken" in rows(named)["pipefusion=8"]
    assert named.rstrip().endswith(
        "PipeFusion is an approximation: its image differs from one GPU's."
    )


def test_plans_whose_weights_are_cast_once_are_marked(capsys):
    _, out, _ = plan(capsys, "--gpus", "8x4090", "--precision", "fp8", "--all")
    table = rows(out)
    assert "weights cast once" in table["ulysses=8,modulation=8"]
    for name in ("ulysses=8", "single", "pipefusion=8", "ulysses=8,fsdp=8"):
        assert "cast once" not in table[name]


def test_a_chosen_plan_that_is_slow_is_shown_all_the_same(capsys):
    _, out, _ = plan(capsys, "--gpus", "4x4090", "--strategy", "fsdp=2")
    assert "<- taken" in rows(out)["ulysses=2,fsdp=2"]


def test_what_does_not_fit_one_gpu_is_streamed_and_said(capsys):
    _, out, _ = plan(capsys, "--gpus", "4x4090", "--model", "flux2-dev")
    assert "weights that do not fit come from CPU memory" in rows(out)["single"]


def test_every_option_reaches_the_job(capsys):
    _, out, _ = plan(
        *(capsys, "--gpus", "4xl40s", "--link", "host", "--sockets", "2", "--cfg", "--batch", "3"),
        *("--model", "flux1-kontext", "--size", "512x768", "--references", "2", "--precision"),
        *("fp8", "--text-tokens", "300", "--steps", "4", "--compiled"),
    )
    assert "6 row(s) of 1536 image, 300 text and 3072 reference tokens" in out
    assert "4xl40s, 2 socket(s); links: through CPU memory (no peer-to-peer)" in out
    assert "flux1-kontext, fp8, compiled" in out
    assert "pipefusion" not in out.split("\n\n")[1]  # 4 steps


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_planned(capsys, model):
    status, out, _ = plan(capsys, "--gpus", "2xh100", "--model", model)
    assert status == 0
    assert f"model    {model}, bf16, eager" in out


@pytest.mark.parametrize("card", CARDS)
def test_every_card_can_be_planned(capsys, card):
    status, out, _ = plan(capsys, "--gpus", f"2x{card}", "--precision", "4bit")
    assert status == 0
    assert f"rates    {card} {CARDS[card].source}" in out


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        ("4x4070", [], '--gpus "4x4070" is not legal. Legal: a count and a card such as'),
        ("2xl20", ["--sockets", "3"], "make 2 GPUs on 3 sockets. Legal: up to 16 GPUs"),
        ("2x4090", ["--link", "nvlink"], "4090 has no NVLink. Legal: pcie, host."),
        ("2xl20", ["--model", "sdxl"], '--model "sdxl" is not legal. Legal: chroma, flux1-dev'),
        ("2xl20", ["--size", "big"], '--size "big" is not legal. Legal: width x height in px'),
        ("2xl20", ["--size", "8x64"], '--size "8x64" is not legal. Legal: width x height'),
        ("2xl20", ["--size", "64x99999"], "each from 16 to 16384."),
        ("2xl20", ["--batch", "0"], '--batch "0" is not legal. Legal: a whole number from 1'),
        ("2xl20", ["--references", "-1"], '--references "-1" is not legal. Legal: a whole number'),
        ("2xl20", ["--text-tokens", "0"], '--text-tokens "0" is not legal. Legal: a whole number'),
        ("2xl20", ["--steps", "0"], '--steps "0" is not legal. Legal: a whole number from 1'),
        ("2xl20", ["--strategy", "ulises"], '--strategy "ulises" is not legal. Legal: single'),
    ],
)
def test_bad_input_is_one_line_with_the_legal_values(capsys, gpus, arguments, said):
    status, out, err = plan(capsys, "--gpus", gpus, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_an_impossible_plan_is_refused_with_the_possible_ones(capsys):
    status, out, _ = plan(capsys, "--gpus", "2xl20", "--strategy", "cfg")
    assert status == 1
    assert (
        "batch is not possible here: batch=2 needs as many rows, and there are 1. Possible" in out
    )
    status, out, _ = plan(capsys, "--gpus", "2xl20", "--strategy", "cfg", "--cfg")
    assert status == 0
    assert "<- taken" in rows(out)["batch=2"]


def test_it_runs_without_site_packages():
    """No torch, no ComfyUI, nothing but the standard library."""
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); "
    code += (
        "from comfy_xdit_patch.__main__ import main; sys.exit(main(['plan', '--gpus', '2xl20']))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "auto takes ulysses=2" in done.stdout
