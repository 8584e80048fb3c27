"""All feature rows, in the sections of docs/compatibility.md.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from rig import (
    feature_controls,
    feature_family,
    feature_hooks,
    feature_packs,
    feature_prompts,
    feature_sampling,
)
from rig.feature_rows import Row

CONTROLS, NODE_PACKS = "ControlNets", "Node packs"
SECTIONS: dict[str, dict[str, Row]] = {
    "Family": feature_family.ROWS,
    CONTROLS: feature_controls.ROWS,
    "Prompts, masks, latents": feature_prompts.ROWS,
    "Samplers, guiders, model nodes": feature_sampling.ROWS | feature_hooks.ROWS,
    NODE_PACKS: feature_packs.ROWS,
}

FEATURES: dict[str, Row] = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
"""The same without sections."""
