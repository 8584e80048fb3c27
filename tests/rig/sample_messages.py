"""One message of every type, with values as they are in use.

Runs in: the tests.
"""

from __future__ import annotations

from comfy_xdit_patch.transport import calls, messages, probing, replies
from comfy_xdit_patch.transport.messages import ModelSource

SOURCE = ModelSource(
    loader="load_diffusion_model",
    path="/models/fl\u00fcx \udcff.safetensors",  # a path that is not UTF-8
    options={"dtype": "torch.float8_e4m3fn", "fp8_optimizations": True},
    size_bytes=23_802_932_552,
    mtime_ns=1_700_000_000_123_456_789,
    uncast=["double_blocks.0.img_attn.norm.query_norm.scale"],
)
TREE = {
    "x": {"$slot": [0, 7, "bfloat16", [1, 16, 128, 128]]},
    "ref_latents": [{"$slot": [1, 1, "float32", []]}, None],
    "transformer_options": {"rope_options": {"scale_x": 1.5, "shift": float("inf"), "on": True}},
}
MESSAGES = [
    messages.Start(
        comfyui_root="/ComfyUI",
        sys_path=["", "/ComfyUI"],
        argv=["main.py", "--cpu"],
        parses_arguments=True,
        arguments={"cpu": True, "reserve_vram": None, "fast": [], "listen": "127.0.0.1"},
        num_threads=None,
        world_size=8,
        join_timeout_s=180.0,
        step_timeout_s=600.0,
    ),
    messages.Map(slot=3, size_bytes=4096),
    messages.Unmap(slots=[1, 2]),
    messages.Load(
        request=1,
        model=2,
        source=SOURCE,
        tensors=None,
        state={"patches": {"a.weight": [[1.0, {"$tuple": [None]}, 1.0, [0, 0, 8], None]]}},
        key="cd" * 32,
        mode="sharded",
        room_bytes=1 << 33,
        verify=True,
        grid=[1, 2, 1, 1, 1],
        weights=[2, 1],
    ),
    messages.Unload(request=9),
    messages.GiveWay(request=9, ranks=[0]),
    messages.Drop(models=[1, 2]),
    calls.Forward(
        request=2,
        model=2,
        grid=[2, 1, 2, 2, 1],
        weights=[],
        arguments=TREE,
        result=0,
        pipeline={"stream": 3, "is_warm_up": True, "num_patches": 4},
    ),
    calls.Free(request=9, streams=[3, 4]),
    calls.Control(
        request=3,
        model=4,
        call=7,
        grid=[1, 1, 1, 8, 1],
        weights=[],
        arguments=TREE,
    ),
    calls.Forget(calls=[5, 6], objects=[1], tokens=[2]),
    calls.RunBlock(
        request=4,
        model=2,
        block="double_blocks.3",
        grid=[1, 1, 2, 4, 1],
        weights=[],
        counts=[512, 4096, 0],
        arguments=TREE,
        patches=None,
        keep=[8, 9],
        is_first=True,
    ),
    calls.Fetch(
        request=5,
        model=2,
        grid=[1, 1, 2, 4, 1],
        weights=[3] * 8,
        tokens=["kept", 8],
        stream="text",
        counts=[512, 4096, 0],
        result=1,
    ),
    probing.Probe(request=6, budget_s=1.0),
    messages.Stop(),
    replies.Joining(rank=1),
    replies.Joined(
        rank=1, pid=4242, device="cuda:0", seconds={"torch": 1.25}, total_bytes=0, free_bytes=0
    ),
    replies.Alive(request=1, count=57),
    replies.Loading(request=1, done=0.25),
    replies.Loaded(
        request=1,
        fingerprint="ab" * 32,
        seconds=3.5,
        is_new=True,
        models=[1, 2],
        digests={"img_in.weight": "float32[8x4]:00"},
        bytes_held=1 << 34,
    ),
    replies.NotLoaded(request=1, error="WorkerError: no memory"),
    replies.Unloaded(request=9),
    replies.Ran(
        request=4,
        num_forwards=9,
        seconds=0.01,
        bytes_between_ranks=1 << 20,
        busy_seconds=0.008,
    ),
    replies.Fetched(request=5, bytes_between_ranks=1 << 20),
    replies.Declined(request=2, reason="KeyError: 'sigmas'"),
    replies.Controlled(
        request=3,
        layout={"input": [0, 0, None], "output": []},
        dtype="bfloat16",
        shape=(1, 4096, 3072),
        seconds=0.01,
        bytes_between_ranks=1 << 20,
    ),
    replies.Done(
        request=2,
        num_forwards=20,
        dtype="bfloat16",
        shape=(2, 16, 128, 128),
        seconds=0.061,
        bytes_between_ranks=123,
        bytes_written=456,
        busy_seconds=0.05,
    ),
    probing.Probed(
        request=6,
        together={"linear_flops": 5.1e14, "call_s": 4.5e-6},
        alone={},
        exchanges={"all_to_all 2 1": [[65536.0, 2.1e-5], [1048576.0, 7.4e-5]]},
        seconds=0.93,
    ),
    probing.NotProbed(request=6, error="OutOfMemoryError: CUDA out of memory"),
    replies.Failed(request=2, phase="forward", error="CUDA out of memory", traceback="a\nb\n"),
]
