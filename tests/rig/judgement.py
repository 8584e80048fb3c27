"""What ``comfy-xdit doctor`` says of a running server.

Runs in: the rig's environment.
"""

from __future__ import annotations

from comfy_xdit_patch.report import doctor
from rig.client import Client


def wrong_of(server: Client, *said: str) -> list[str]:
    """What the doctor marks as wrong; it must say each of these texts."""
    report = doctor.examine(comfyui=None, url=server.url)
    for text in said:
        assert text in report.text, f"the doctor does not say {text!r}:\n{report.text}"
    return [line.text for _, lines in report.sections for line in lines if line.is_wrong]
