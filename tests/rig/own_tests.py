"""What ComfyUI's own tests said.

Runs in: the rig's environment.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path


def outcomes(report: Path) -> dict[str, str]:
    """Outcome of each test by its name, from the report that pytest wrote."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found
