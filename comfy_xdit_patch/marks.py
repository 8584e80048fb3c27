"""Names that ``bootstrap`` and the rest of the package share.

Runs in: every Python process of the environment; imports nothing.
"""

# The modules that the patch points live in; a test keeps this equal to host/guest/points.py. They
# are named here so that a process without ComfyUI pays for two sets and no import.
SAMPLING_MODULES = frozenset(
    {
        "comfy.ldm.chroma.model",
        "comfy.ldm.chroma_radiance.model",
        "comfy.ldm.flux.model",
        "comfy.model_base",
        "comfy.model_management",
        "comfy.model_patcher",
        "comfy.samplers",
        "comfy.sd",
    }
)
DECODE_MODULES = frozenset({"comfy.ldm.modules.diffusionmodules.model", "comfy.sd", "comfy.utils"})
CONTROL_MODULES = frozenset({"comfy.controlnet", "comfy.ldm.flux.controlnet"})
SERVER_MODULES = frozenset({"server"})
EXECUTION_MODULES = frozenset({"execution"})
SETS = (SAMPLING_MODULES, DECODE_MODULES, CONTROL_MODULES, SERVER_MODULES, EXECUTION_MODULES)
WORKER_MARK = "_COMFY_XDIT_WORKER"
"""Set in a worker's environment: a worker imports ComfyUI and must not patch it."""
