"""The plain attributes of a model's modules: numbers, texts and lists that its code computes with.

Runs in: host and worker. No torch.

``theta`` of the positions, ``eps`` of a norm, how many heads a block has. A node may set them on
the model that ComfyUI holds; the workers built theirs from the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from comfy_xdit_patch.wire.describing import PLAIN

Attributes = dict[str, dict[str, str]]
"""By the module's name and the attribute's: what its value is printed as."""
BOOKKEEPING = re.compile(
    r"_|training$|weight$|bias$|seed_key$|.*(comfy|_function$)"
    r"|(current|dynamic|lowvram|model)_|device$|skip_injection$"
)
"""Names of torch's and ComfyUI's own, which say where weights are and how they come to be used; the
last ones are on a ControlNet's model, which is ComfyUI's whole model too."""
PARAMETERS = "params"
"""What a model was built with. ``default_ref_method`` in it is an argument of every call."""
ARGUMENT = "default_ref_method"


def plain_attributes(flux: Any) -> Attributes:
    """Return the plain attributes of all modules of a model, without those that have none."""
    found: Attributes = {}
    for name, module in flux.named_modules():
        if hasattr(module, "_orig_mod"):
            continue  # a compiled module stands in for this one
        texts = dict(_texts(vars(module)))
        if texts:
            found[name.replace("._orig_mod", "")] = texts
    parameters = vars(getattr(flux, PARAMETERS, None) or object)
    more = {f"{PARAMETERS}.{name}": text for name, text in _texts(parameters) if name != ARGUMENT}
    found.setdefault("", {}).update(more)
    return found


def changed(theirs: Attributes, ours: Attributes) -> Iterator[tuple[str, str]]:
    """Yield module and attribute where two models differ."""
    for module in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(module, {}), ours.get(module, {})
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                yield module, name


def _texts(attributes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in attributes.items():
        items = value if type(value) in (list, tuple) else [value]
        if all(type(item) in PLAIN for item in items) and not BOOKKEEPING.match(name):
            yield name, repr(list(items))
