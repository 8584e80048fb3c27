"""A pytest plugin: ComfyUI's own unit tests on a machine without a GPU, under a CUDA torch.

Runs in: the process of ComfyUI's unit tests. The same as starting ComfyUI with ``--cpu``.
"""

from comfy.cli_args import args

args.cpu = True

# Not every version's tests import both, and the patch waits for them.
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402, F401


def pytest_terminal_summary(terminalreporter) -> None:  # type: ignore[no-untyped-def]
    """Say whether our package took part, so that a test can check it."""
    import sys

    activation = sys.modules.get("comfy_xdit_patch.host.guest.activation")
    patch_set = getattr(activation, "ACTIVATION", None) and activation.ACTIVATION.sampling
    terminalreporter.write_line(f"xdit active: {bool(patch_set and patch_set.active)}")
