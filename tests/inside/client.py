"""Talk to a ComfyUI process of ``process.py``.

Runs in: the test's process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rig.server import settings_of
from rig.trees import Tree

HERE = Path(__file__).parent
SHIM = HERE.parent / "rig" / "shim"
START_DEADLINE_S = 300.0
CALL_DEADLINE_S = 600.0


class Inside:
    """One ComfyUI process; ``call("module:function", ...)`` runs a body in it."""

    def __init__(self, tree: Tree, env: dict[str, str]) -> None:
        self.log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - lives as long as the process
            prefix=f"inside-{tree.version}-", suffix=".log", mode="w+"
        )
        read, write = os.pipe()
        variables = {k: v for k, v in os.environ.items() if not k.startswith("XDIT_")}
        variables |= {"PYTHONPATH": str(SHIM), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "process.py"), "--root", str(tree.path)]
        command += ["--reply-fd", str(write), "--cpu", "--use-pytorch-cross-attention"]
        self.process = subprocess.Popen(
            command,
            env=variables | settings_of(env),
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        self._replies = os.fdopen(read)
        self.env = env
        self._answer(START_DEADLINE_S)

    def have(self, env: dict[str, str]) -> None:
        """Go on as if started with these variables; if XDIT_* ones differ, the ranks are new."""
        if env != self.env:
            self.call("rig_shim_door:change_settings", variables=settings_of(env))
            self.env = env

    def call(self, body: str, **kwargs: Any) -> Any:
        """Run a body and return its result; its exception becomes ours."""
        self.start_call(body, **kwargs)
        return self._answer(CALL_DEADLINE_S)

    def start_call(self, body: str, **kwargs: Any) -> None:
        """Have a body run without waiting for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"body": body, "kwargs": kwargs}) + "\n")
        self.process.stdin.flush()

    def finish_call(self) -> Any:
        """Wait for the body started last."""
        return self._answer(CALL_DEADLINE_S)

    def log_text(self) -> str:
        return Path(self.log.name).read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()

    def _answer(self, deadline_s: float) -> Any:
        ready, _, _ = select.select([self._replies], [], [], deadline_s)
        line = self._replies.readline() if ready else ""
        if not line:
            raise RuntimeError(f"No answer. Its log ends:\n{self.log_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]
