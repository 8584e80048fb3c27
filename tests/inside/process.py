"""A ComfyUI process without a server, that runs test bodies on demand.

Runs in: its own process; ``conftest.py`` starts one stock and one with ranks for each ComfyUI.

    stdin   one JSON object a line: {"body": "module:function", "kwargs": {...}}
    fd N    one JSON object a line: {"result": ...} or {"error": "traceback"}

ComfyUI and our package start as they do under ``main.py``: the .pth has run, the command line is
parsed by ComfyUI, its modules are imported in its order.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    options, comfyui_argv = parser.parse_known_args()
    replies = os.fdopen(options.reply_fd, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    bodies = Path(__file__).parent
    sys.path.insert(0, options.root)
    sys.argv = [str(Path(options.root) / "main.py"), *comfyui_argv]
    os.chdir(options.root)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    sys.path.append(str(bodies))
    replies.write(json.dumps({"result": "ready"}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, function = request["body"].split(":")
            result = getattr(importlib.import_module(module), function)(**request["kwargs"])
            replies.write(json.dumps({"result": result}) + "\n")
        except BaseException:  # noqa: BLE001 - the test that asked wants to see it
            replies.write(json.dumps({"error": traceback.format_exc()}) + "\n")


if __name__ == "__main__":
    main()
