"""A Python that has imported what ComfyUI imports of others, and forks ComfyUI processes.

Runs in: its own process, started by ``warm.py``; the forked ones run a script as ``python SCRIPT``.

A cold start of ComfyUI spends 13 CPU-seconds, most of them on packages that neither ComfyUI nor we
wrote. Nothing of ComfyUI's is imported here and our package is switched off: its start file and
ComfyUI's ``main.py`` run in each forked process as in a cold one.

    socket   ->  {"script", "arguments", "folder", "environment", "targets"} and the descriptors
                 that get the numbers of ``targets``
             <-  {"pid"}, and {"pid", "code"} when it has ended; a signal's code is negative
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import site
import socket
import sys
from pathlib import Path
from typing import Any

PACKAGES = """
    torch torch._dynamo torch.fx.experimental.symbolic_shapes torchvision torchvision.models
    torchaudio transformers transformers.modeling_utils transformers.models.clip.tokenization_clip
    scipy.integrate scipy.stats scipy.special scipy.ndimage sqlalchemy.orm alembic.command
    alembic.config aiohttp.web av kornia spandrel torchsde requests huggingface_hub tokenizers
    pydantic pydantic_settings PIL.Image yaml psutil einops safetensors.torch trampoline
"""
"""Those that this ComfyUI does not need may be missing."""

MAX_MESSAGE_BYTES = 1 << 17
MAX_DESCRIPTORS = 8
PR_SET_NAME = 15


def main() -> None:
    """Import, fork for every request, and in a forked process become ComfyUI."""
    link = socket.socket(fileno=int(sys.argv[1]))
    sys.path.pop(0)  # The rig's own folder, where modules have common names.
    for name in PACKAGES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # Collections in what is forked would copy the pages of all of it.
    paths = list(sys.path)
    running: dict[int, int] = {}
    while True:
        ready = select.select([link, *running], [], [])[0]
        for pidfd in (fd for fd in ready if fd in running):
            pid = running.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            link.send(json.dumps({"pid": pid, "code": code}).encode())
        if link not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not message:
            return
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            become(request, descriptors, paths)
            return
        running[os.pidfd_open(pid)] = pid
        for fd in descriptors:
            os.close(fd)
        link.send(json.dumps({"pid": pid}).encode())


def become(request: dict[str, Any], descriptors: list[int], paths: list[str]) -> None:
    """Run the script as ``python SCRIPT ARGUMENTS`` would have, in a session of its own."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"rig-comfyui", 0, 0, 0)
    _take(dict(zip(request["targets"], descriptors, strict=True)))
    # A shell has what it runs in the background, tests too, ignore Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    script, arguments = request["script"], request["arguments"]
    sys.argv = [script, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    own = [str(Path(script).absolute().parent)]
    own += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = own + [path for path in paths if path not in own]
    # The rest of what the interpreter does at its start: our start file, and ``sitecustomize``.
    importlib.import_module("comfy_xdit_patch.bootstrap").start()
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    runpy.run_path(script, run_name="__main__")


def _take(targets: dict[int, int]) -> None:
    """Give each descriptor its number, and close all others."""
    above = max(targets) + 1
    copies = {t: fcntl.fcntl(fd, fcntl.F_DUPFD, above) for t, fd in targets.items()}
    for target, fd in copies.items():
        os.dup2(fd, target)
    last = 3
    for target in sorted(t for t in targets if t >= 3):
        os.closerange(last, target)
        last = target + 1
    os.closerange(last, os.sysconf("SC_OPEN_MAX"))


if __name__ == "__main__":
    main()
