"""Settings of torch go from one process to another, here by way of a change and back."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.wire import torch_settings


@pytest.fixture(autouse=True)
def _as_before():
    before = torch_settings.current()
    yield
    torch_settings.follow(before)
    assert torch_settings.current() == before


def default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def autocast() -> None:
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_enabled("cpu", True)


def matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def backends() -> None:
    torch.backends.mkldnn.enabled = False
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_flash_sdp(False)


def deterministic() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize(
    "change", [default_dtype, autocast, matmul_precision, backends, deterministic]
)
def test_a_change_is_followed(change) -> None:
    before = torch_settings.current()
    change()
    changed = torch_settings.current()
    assert changed != before
    torch_settings.follow(before)
    assert torch_settings.current() == before
    torch_settings.follow(changed)
    assert torch_settings.current() == changed


def test_modes_are_named_but_for_a_default_device() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        pass

    assert torch_settings.modes() == []
    with torch.device("cpu"):
        assert torch_settings.modes() == []
    with Mode():
        assert [name.rpartition(".")[2] for name in torch_settings.modes()] == ["Mode"]
