"""Bodies that call FLUX's forward as ComfyUI's samplers do.

Runs in: a ComfyUI process of ``process.py``; torch and ComfyUI are imported there.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch

MOST_MODELS = 2
"""Of every one there is a copy in each process. A test uses one after the other, two at most."""
_patchers: dict[str, Any] = {}  # the latest one last


def patcher_of(path: str, **model_options: Any) -> Any:
    """Load a diffusion model once, as UNETLoader does."""
    key = f"{path} {sorted(model_options.items())}"
    if key in _patchers:
        _patchers[key] = _patchers.pop(key)
    else:
        while len(_patchers) >= MOST_MODELS:
            del _patchers[next(iter(_patchers))]
        gc.collect()
        options = {
            name: getattr(torch, value) if name == "dtype" else value
            for name, value in model_options.items()
        }
        _patchers[key] = comfy.sd.load_diffusion_model(path, model_options=options)
    return _patchers[key]


def inputs(
    base: Any,
    *,
    height: int,
    width: int,
    batch: int,
    text_tokens: int,
    refs: list[list[int]] = (),  # type: ignore[assignment]
    ref_method: str | None = None,
    control: int | None = None,
    mask: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Make random arguments of ``BaseModel.apply_model``; sizes of latents, not pixels."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    flux = base.diffusion_model
    channels = base.latent_format.latent_channels
    arguments: dict[str, Any] = {
        "x": noise(batch, channels, height, width),
        "t": torch.linspace(0.9, 0.4, batch),
        "c_crossattn": noise(batch, text_tokens, flux.params.context_in_dim),
    }
    if channels < flux.params.in_channels == 96:  # Fill: mask and masked image beside the latent
        arguments["c_concat"] = noise(batch, flux.params.in_channels - channels, height, width)
    if getattr(flux.params, "vec_in_dim", None) is not None:
        arguments["y"] = noise(batch, flux.params.vec_in_dim)
    if getattr(flux.params, "guidance_embed", True):  # Chroma is always guided
        arguments["guidance"] = torch.full((batch,), 3.5)
    if refs:
        arguments["ref_latents"] = [noise(batch, channels, h, w) for h, w in refs]
    if ref_method is not None:
        arguments["ref_latents_method"] = ref_method
    side = flux.patch_size
    num_tokens = [-(-h // side) * -(-w // side) for h, w in ((height, width), *refs)]
    if control is not None:  # residuals of so many tokens, some shared, some missing
        shared = noise(batch, control, flux.hidden_size) * 0.3
        own = noise(batch, control, flux.hidden_size) * 0.3
        arguments["control"] = {
            "input": [shared, None][: len(flux.double_blocks)],
            "middle": [],
            "output": [own, shared][: len(flux.single_blocks)],
        }
    if mask:  # as Redux's: a bias for each pair of tokens
        length = text_tokens + sum(num_tokens)
        arguments["attention_mask"] = noise(1, length, length)
    return arguments


def same_block(arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
    """Stand in a block's place, as a node's function does, and call it."""
    return extra["original_block"](arguments)


def louder_with_place(attention: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """Scale what attention gave by each token's place, which a rank alone does not know."""
    return attention * torch.linspace(0.9, 1.1, attention.shape[1])[None, :, None]


def own_attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in the place of ComfyUI's attention function, as a node's does."""
    return function(*args, **kwargs)


def node_options(
    *,
    replaces_blocks: bool = False,
    chooses_attention: bool = False,
    patches_attention: bool = False,
) -> dict[str, Any]:
    """Make ``transformer_options`` as nodes leave them."""
    options: dict[str, Any] = {}
    if replaces_blocks:
        blocks = {("double_block", 0): same_block, ("single_block", 0): same_block}
        options["patches_replace"] = {"dit": blocks}
    if patches_attention:
        options["patches"] = {"attn1_output_patch": [louder_with_place]}
    if chooses_attention:
        options["optimized_attention_override"] = own_attention
    return options


NODE_OPTIONS = ("replaces_blocks", "chooses_attention", "patches_attention")


def forward(
    path: str,
    out: str,
    options: dict[str, Any] | None = None,
    *,
    replaces_blocks: bool = False,
    chooses_attention: bool = False,
    patches_attention: bool = False,
    patches_weights: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    """Run one forward and save its output; ``options`` are UNETLoader's model options."""
    transformer_options = node_options(
        replaces_blocks=replaces_blocks,
        chooses_attention=chooses_attention,
        patches_attention=patches_attention,
    )
    patcher = patcher_of(path, **(options or {}))
    if patches_weights:
        patcher = patched(patcher)
    with torch.inference_mode(patches_weights):  # as ComfyUI patches; float8 cannot be otherwise
        comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    base = patcher.model
    arguments = inputs(base, **sizes)
    with torch.inference_mode():
        result = base.apply_model(**arguments, transformer_options=transformer_options)
    torch.save(result, out)
    return status()


def patched(patcher: Any) -> Any:
    """Return a clone with a weight patch on everything in the blocks, as a loader of LoRAs does."""
    clone = patcher.clone()
    generator = torch.Generator().manual_seed(3)
    differences = {
        f"diffusion_model.{name}": (
            "diff",
            (torch.randn(p.shape, generator=generator) * 0.5 * p.shape[-1] ** -0.5,),
        )
        for name, p in patcher.model.diffusion_model.named_parameters()
        if "_blocks." in name and "scale" not in name
    }
    clone.add_patches(differences, 0.7)
    return clone


@contextmanager
def sampling_run() -> Iterator[None]:
    """Have the calls meanwhile be one sampling run's; where our package is off, nobody notes it."""
    activation = sys.modules.get("comfy_xdit_patch.host.guest.activation")
    if activation is None:
        yield
        return
    host = activation.ACTIVATION.host
    run = host.begin_run()
    token = host.current_run.set(run)
    try:
        yield
    finally:
        host.current_run.reset(token)
        host.end_run(run)


def run_of_calls(path: str, calls: int, **sizes: Any) -> list[dict[str, Any]]:
    """Make model calls within one sampling run; return how long each took, host and ranks.

    The latent changes from call to call, the conditioning does not but is a new tensor each time,
    as in ComfyUI's samplers.
    """
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    arguments = inputs(patcher.model, **sizes)
    times = []
    with sampling_run(), torch.inference_mode():
        for _ in range(calls):
            arguments = {name: value.clone() for name, value in arguments.items()}
            arguments["x"] += 0.01
            patcher.model.apply_model(**arguments, transformer_options={})
            now = status()
            times.append(
                {
                    "host": now["last_step_s"],
                    "ranks": [rank["step_s"] for rank in now["ranks"]],
                    "busy": [rank["busy_s"] for rank in now["ranks"]],
                }
            )
    return times


def peak_bytes(path: str, **sizes: Any) -> int:
    """Peak of memory that one forward adds in this process."""
    forward(path, "/dev/null", **sizes)
    before = reset_peak()
    forward(path, "/dev/null", **sizes)
    return added_at_peak(before)


def rank_peak_bytes(path: str, **sizes: Any) -> list[int]:
    """The same for every rank's process."""
    after = forward(path, "/dev/null", **sizes)
    pids = [rank["pid"] for rank in after["ranks"]]
    before = [reset_peak(pid) for pid in pids]
    forward(path, "/dev/null", **sizes)
    return [added_at_peak(old, pid) for old, pid in zip(before, pids, strict=True)]


def reset_peak(pid: int | str = "self") -> int:
    """Have the kernel forget a process's peak (proc(5), clear_refs), return what it holds now.

    Anonymous memory, in bytes: tensors are that.
    """
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return resident("RssAnon", pid)


def added_at_peak(before: int, pid: int | str = "self") -> int:
    """Anonymous memory at the peak, above what was held before, in bytes.

    The kernel keeps a peak of all memory only. Pages of files and of shared memory (the mailboxes
    of ranks) stay once they are there, so what there is of them now is taken off the peak.
    """
    shared = resident("RssFile", pid) + resident("RssShmem", pid)
    return resident("VmHWM", pid) - shared - before


def resident(field: str, pid: int | str = "self") -> int:
    """Return a field of a process's memory (``VmRSS``, ``VmHWM``...) in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def status() -> dict[str, Any]:
    """Our status object, or an empty one where our package is switched off."""
    activation = sys.modules.get("comfy_xdit_patch.host.guest.activation")
    return activation.ACTIVATION.status().to_dict() if activation is not None else {}
