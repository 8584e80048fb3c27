"""ComfyUI's interrupt, where there is no ComfyUI."""

from __future__ import annotations

import sys
import types

import pytest


@pytest.fixture(params=[Exception, BaseException], ids=["0.3.75", "0.33.0"])
def interrupt(request, monkeypatch):
    """ComfyUI's interrupt, with the base class it has in each version."""
    cls = type("InterruptProcessingException", (request.param,), {})
    comfy, management = types.ModuleType("comfy"), types.ModuleType("comfy.model_management")
    comfy.model_management, management.InterruptProcessingException = management, cls
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    return cls
