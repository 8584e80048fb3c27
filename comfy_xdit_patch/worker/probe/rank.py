"""Measure how fast this rank computes, in a part of a second.

Runs in: worker process.

The names and units of what is measured:

    linear_flops        FLOP/s of a linear of FLUX's form
    linear_rows         rows of that linear
    attention_flops     FLOP/s of attention, by torch's own function
    copy_bytes_per_s    bytes read and written a second in the device's memory
    host_bytes_per_s    bytes a second from CPU memory to the device
    call_s              seconds from one call of an ATen operator to the next, in eager mode

A GPU computes in bf16, a CPU rank in float32, as ComfyUI does there. Sizes are the largest that the
time allows, for a card's full rate shows in large matrices only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Size = tuple[int, int]
Run = Callable[[], object]

HEAD_WIDTH = 128
LINEAR_SIZES = ((256, 512), (512, 512), (1024, 768), (2048, 1536), (4352, 3072))
"""Rows and width, as FLUX.1 has them at 1024 px in the last; a linear widens four times."""
ATTENTION_SIZES = ((256, 4), (512, 4), (1024, 6), (2048, 12), (4352, 24))
"""Tokens and heads."""
COPY_BYTES = (16 << 20, 128 << 20)
"""Of a CPU rank and of a GPU: more than a core's own caches hold, and a GPU's."""
FROM_HOST_BYTES = 64 << 20

PARTS = {"linear": 0.4, "attention": 0.35, "copy": 0.15, "calls": 0.1}
"""Of the time."""
NUM_RUNS = 4
"""Runs of a size for which there must be time."""
MAX_SAMPLES = 15
MAX_RUNS = 16
SAMPLE_S = 2e-3
"""A sample is about so long at least: to wait for a GPU costs some 20 us."""
MAX_CALL_SAMPLES = 200

WAKE_S = 0.2
WAKE_WIDTH = 2048

CALL_WIDTH = 64
NUM_CALLS = 20
"""ATen calls of one ``_few_calls``; a test counts them."""


def calibrate(device: torch.device, budget_s: float) -> dict[str, float]:
    """Measure all of the above. Every rank does so for itself.

    Raises:
        RuntimeError: the device has no room, or fails.
    """
    dtype = compute_dtype(device)
    if device.type == "cuda":
        _wake(device, dtype)
    found = _linear(device, dtype, budget_s * PARTS["linear"])
    found |= _attention(device, dtype, budget_s * PARTS["attention"])
    found |= _copies(device, budget_s * PARTS["copy"])
    return found | _calls(device, dtype, budget_s * PARTS["calls"])


def _wake(device: torch.device, dtype: torch.dtype) -> None:
    """Compute until the device's clock is up, which an idle one takes down."""
    a = torch.zeros(WAKE_WIDTH, WAKE_WIDTH, device=device, dtype=dtype)
    end = time.perf_counter() + WAKE_S
    while time.perf_counter() < end:
        torch.mm(a, a)
        _wait(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What ComfyUI computes FLUX in, if nobody says otherwise.

    bf16 that a card only emulates does not count: ComfyUI computes in fp16 there.
    """
    if device.type == "cpu":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def _linear(device: torch.device, dtype: torch.dtype, budget_s: float) -> dict[str, float]:
    def make(size: Size) -> Run:
        rows, width = size
        x = torch.randn(rows, width, device=device, dtype=dtype)
        weight = torch.randn(4 * width, width, device=device, dtype=dtype)
        bias = torch.randn(4 * width, device=device, dtype=dtype)
        return lambda: F.linear(x, weight, bias)

    def flops(size: Size) -> float:
        return 8.0 * size[0] * size[1] ** 2

    (rows, _), rate = _largest(LINEAR_SIZES, make, flops, device, budget_s)
    return {"linear_flops": rate, "linear_rows": float(rows)}


def _attention(device: torch.device, dtype: torch.dtype, budget_s: float) -> dict[str, float]:
    def make(size: Size) -> Run:
        tokens, heads = size
        shape = (1, heads, tokens, HEAD_WIDTH)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)

    def flops(size: Size) -> float:
        return 4.0 * size[0] ** 2 * size[1] * HEAD_WIDTH

    _, rate = _largest(ATTENTION_SIZES, make, flops, device, budget_s)
    return {"attention_flops": rate}


def _largest(
    sizes: Sequence[Size],
    make: Callable[[Size], Run],
    flops: Callable[[Size], float],
    device: torch.device,
    budget_s: float,
) -> tuple[Size, float]:
    """Time the largest size for which there is time; return it, and its FLOPs a second."""
    end = time.perf_counter() + budget_s
    chosen = sizes[0]
    seconds = median_s(make(chosen), device, budget_s / 4)
    rate = flops(chosen) / seconds
    left_s = end - time.perf_counter()
    fitting = [size for size in sizes[1:] if NUM_RUNS * flops(size) / rate < left_s]
    if fitting:
        chosen = fitting[-1]
        rate = flops(chosen) / median_s(make(chosen), device, left_s)
    return chosen, rate


def _copies(device: torch.device, budget_s: float) -> dict[str, float]:
    is_cpu = device.type == "cpu"
    source = torch.zeros(COPY_BYTES[0 if is_cpu else 1], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device, budget_s)
    found = {"copy_bytes_per_s": 2 * source.nbytes / copy_s}
    if is_cpu:
        return found | {"host_bytes_per_s": found["copy_bytes_per_s"]}
    pinned = torch.zeros(FROM_HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    place = target[:FROM_HOST_BYTES]
    from_host_s = median_s(lambda: place.copy_(pinned, non_blocking=True), device, budget_s)
    return found | {"host_bytes_per_s": pinned.nbytes / from_host_s}


def _calls(device: torch.device, dtype: torch.dtype, budget_s: float) -> dict[str, float]:
    x = torch.zeros(1, 4, CALL_WIDTH, device=device, dtype=dtype)
    weight = torch.zeros(2 * CALL_WIDTH, CALL_WIDTH, device=device, dtype=dtype)
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    few_calls(x, weight)
    while not samples or (time.perf_counter() < end and len(samples) < MAX_CALL_SAMPLES):
        begin = time.perf_counter()
        few_calls(x, weight)
        samples.append(time.perf_counter() - begin)
        _wait(device)  # Otherwise a full queue of a slow GPU would be timed.
    return {"call_s": min(samples) / NUM_CALLS}


def few_calls(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Make calls as a transformer block makes them, on a few numbers: calling takes the time."""
    for _ in range(2):
        normal = F.layer_norm(x, (CALL_WIDTH,)) * 1.5 + 0.5
        up, gate = F.linear(normal[0], weight).chunk(2, dim=-1)
        joined = torch.cat((up, F.gelu(gate)), dim=-1)
        x = x + joined[:, :CALL_WIDTH]
    return x


def median_s(run: Run, device: torch.device, budget_s: float) -> float:
    """Time a computation: the median of as many samples as the time allows, but one at least.

    The first run, in which kernels are chosen and memory is touched, is not counted.
    """
    end = time.perf_counter() + budget_s
    run()
    _wait(device)
    samples: list[float] = []
    num_runs = 1
    while not samples or (len(samples) < MAX_SAMPLES and time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(num_runs):
            run()
        _wait(device)
        sample_s = (time.perf_counter() - begin) / num_runs
        if not samples and num_runs == 1 and sample_s < SAMPLE_S / 2:
            num_runs = min(MAX_RUNS, int(SAMPLE_S / sample_s))  # and this one is no sample
            continue
        samples.append(sample_s)
    return statistics.median(samples)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
