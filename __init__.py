"""For ComfyUI, which imports every folder of custom_nodes: no nodes, and a hint if it is not on."""

import logging
import sys

NODE_CLASS_MAPPINGS: dict[str, type] = {}
if "comfy_xdit_patch" not in sys.modules:
    logging.warning(
        "comfy-xdit-patch is not enabled in %s: run %s/install.py with it, and restart ComfyUI.",
        sys.executable,
        __path__[0],
    )
