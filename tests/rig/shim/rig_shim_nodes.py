"""Let ComfyUI's nodes load the corpus' tiny model patches, as ``rig_shim_corpus`` does for models.

Runs in: every Python process of a rig server, workers too; ``sitecustomize`` imports it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    StateDict = Mapping[str, Any]

MODEL_PATCHES = "nodes_model_patch.py"


def adapt_node_loader(nodes: Any) -> None:
    """ComfyUI runs files of nodes without an import, so adapt this one when it has been run."""
    load = nodes.load_custom_node

    async def load_custom_node(module_path: str, *args: Any, **kwargs: Any) -> Any:
        loaded = await load(module_path, *args, **kwargs)
        if loaded and module_path.endswith(MODEL_PATCHES):
            import sys

            adapt_uso(sys.modules[module_path.removesuffix(".py")])
        return loaded

    nodes.load_custom_node = load_custom_node


def adapt_uso(module: Any) -> None:
    """Let the widths of USO's projector follow the file."""
    projector = module.SigLIPMultiFeatProjModel
    construct = projector.__init__
    load = projector.load_state_dict

    def remember(self: Any, **kwargs: Any) -> None:
        construct(self, **kwargs)
        self.made_with = kwargs

    def load_state_dict(self: Any, state_dict: StateDict, *args: Any, **kwargs: Any) -> Any:
        hidden, width = state_dict["high_projection.weight"].shape
        widths = {"siglip_token_dims": width, "hidden_size": hidden}
        construct(self, **{**self.made_with, **widths})
        return load(self, state_dict, *args, **kwargs)

    projector.__init__, projector.load_state_dict = remember, load_state_dict
