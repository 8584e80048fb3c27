"""xfuser on CPU ranks: what it takes to import it, and to give it groups, where there is no GPU.

Runs in: a rank of a benchmark, once ``torch.distributed`` is initialised.

xfuser 0.7.0 asks for a GPU while it is imported, and leaves out what sequence parallelism needs
where there is none: its long-context groups, and yunchang's process groups. Both work over gloo.
Nothing of it is edited; answers are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

EXACT = 1e-5
"""Relative, in float32: what is further away is another result."""
FLASH_CPU = "torch's flash kernel for CPUs"


def prepare() -> ModuleType:
    """Import xfuser; return its module with ``USP``."""
    os.environ["XDIT_LOGGING_LEVEL"] = "ERROR"
    unexecuted = _package("xfuser")
    envs: Any = importlib.import_module("xfuser.envs")
    # A torch that was built with CUDA is taken for a GPU.
    envs._is_cuda = lambda: False
    envs.get_device_version = lambda: None
    # xfuser.config and parallel_state read it when xfuser's ``__init__`` imports them.
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
    assert unexecuted.__spec__ is not None
    assert unexecuted.__spec__.loader is not None
    unexecuted.__spec__.loader.exec_module(unexecuted)
    usp: Any = importlib.import_module("xfuser.model_executor.layers.usp")
    usp.PROCESS_GROUP = importlib.import_module("yunchang.globals").PROCESS_GROUP
    usp.ATTENTION_FUNCTION_REGISTRY[FLASH_CPU] = flash_for_cpu
    return usp  # type: ignore[no-any-return]


def _package(name: str) -> ModuleType:
    """Make a package known whose ``__init__`` has not run yet."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is installed"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    return module


def make_long_context() -> float:
    """Make xfuser's older attention."""
    layer = importlib.import_module("xfuser.core.long_ctx_attention.hybrid.attn_layer")
    layer.xFuserLongContextAttention()
    return 0.0


def outcome(call: Callable[[], float]) -> float | str:
    """Return the error that something of xfuser's has, or what it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is asked for
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def worst(outcomes: Sequence[float | str]) -> float | str:
    """Return the worst outcome of all ranks."""
    return max(outcomes, key=lambda found: (isinstance(found, str), found))


def said(found: float | str) -> str:
    """Put an outcome into words."""
    if isinstance(found, str):
        return f"raises {found}"
    return f"error {found:.1e}" + (", and it says nothing" if found > EXACT else "")


def have_groups(*, ulysses: int, ring: int) -> None:
    """Make xfuser's groups anew, of all ranks. Collective."""
    from xfuser.config import xFuserArgs
    from xfuser.core.distributed import parallel_state, runtime_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    else:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        parallel_state.init_distributed_environment(
            world_size=world_size, rank=rank, local_rank=rank, backend="gloo"
        )
    degrees = {"ulysses_degree": ulysses, "ring_degree": ring}
    parallel_state.initialize_model_parallel(
        sequence_parallel_degree=ulysses * ring, backend="gloo", **degrees
    )
    config, _ = xFuserArgs(model="none", attention_backend="SDPA_FLASH", **degrees).create_config()

    class OfThisWorld(runtime_state.ExternalRuntimeState):  # type: ignore[misc]
        """xfuser's own makes a configuration of one rank for itself, and refuses more."""

        def __init__(self) -> None:
            runtime_state.RuntimeState.__init__(self, config)

    runtime_state._RUNTIME = OfThisWorld()


def flash_for_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend for xfuser's registry: of its own ones, none with a log-sum-exp runs on a CPU."""
    mask = (attention_kwargs or {}).get("attn_mask")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=mask
    )
    return out, lse
