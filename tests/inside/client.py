"""Talk to a ComfyUI process of ``process.py``.

Runs in: the test's process.
"""

from __future__ import annotations

import json
import os
import select
import tempfile
from pathlib import Path
from typing import Any

from rig.server import environment_of, settings_of
from rig.trees import Tree
from rig.warm import start

HERE = Path(__file__).parent
START_DEADLINE_S = 300.0
CALL_DEADLINE_S = 600.0


class Inside:
    """One ComfyUI process; ``call("module:function", ...)`` runs a body in it."""

    def __init__(self, tree: Tree, env: dict[str, str]) -> None:
        self.log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - lives as long as the process
            prefix=f"inside-{tree.version}-", suffix=".log", mode="w+"
        )
        read, write = os.pipe()
        stdin, bodies = os.pipe()
        command = [str(HERE / "process.py"), "--root", str(tree.path), "--reply-fd", str(write)]
        self.process = start(
            [*command, "--cpu", "--use-pytorch-cross-attention"],
            folder=tree.path,
            environment=environment_of(env, threads=1),
            stdin=stdin,
            output=self.log.fileno(),
            pass_fds=(write,),
        )
        os.close(write)
        os.close(stdin)
        self._replies = os.fdopen(read)
        self._bodies = os.fdopen(bodies, "w", buffering=1)
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
        self._bodies.write(json.dumps({"body": body, "kwargs": kwargs}) + "\n")

    def finish_call(self) -> Any:
        """Wait for the body started last."""
        return self._answer(CALL_DEADLINE_S)

    def log_text(self) -> str:
        return Path(self.log.name).read_text()

    def close(self) -> None:
        self._bodies.close()
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
