"""Number the models that the workers may hold, and remember which file each came from.

Runs in: host process.

ComfyUI 0.33 keeps the loader and its arguments on the patcher, 0.3.75 keeps nothing, so the two
loaders are wrapped. A model that came any other way has no file; its tensors are carried.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.compiled import original
from comfy_xdit_patch.wire.files import file_identity, is_mapped_here
from comfy_xdit_patch.wire.messages.requests import ModelSource
from comfy_xdit_patch.wire.values import PLAIN


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's number for the workers, and the file they find its weights in, if there is one."""

    number: int
    source: ModelSource | None


class ModelRegistry:
    """The models alive in the host; forgets a model with its last reference."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, KnownModel] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count(1)
        self._gone: list[int] = []

    def remember(
        self, base_model: Any, loader: str, path: str, options: dict[str, Any], *, file: str
    ) -> None:
        """Note where a model came from.

        Args:
            base_model: ComfyUI's ``BaseModel``, shared by all clones of its patcher.
            options: the loader's ``model_options``.
            file: the identity of the file before ComfyUI read it; what was written meanwhile, half
                of it may have read.
        """
        if not file or file_identity(path) != file:
            self._number(base_model, None)
            return
        plain: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(value, torch.dtype):
                plain[name] = str(value)
            elif isinstance(value, PLAIN):
                plain[name] = value
            else:
                self._number(base_model, None)  # Another process cannot load it like that.
                return
        source = ModelSource(
            loader=loader,
            path=os.path.abspath(path),
            options=plain,
            file=file,
            dtypes=_dtypes(base_model),
        )
        self._number(base_model, source)

    def find(self, base_model: Any) -> KnownModel:
        """Return a model's number and source."""
        return self._known.get(base_model) or self._number(base_model, None)

    def find_loaded(self, base_model: Any, uncast: list[str]) -> KnownModel:
        """The same, for a load; a model that keeps other weights uncast now has a new number.

        Args:
            uncast: see ``ModelSource``.
        """
        known = self.find(base_model)
        if known.source is None or known.source.uncast == uncast:
            return known
        self._gone.append(known.number)
        return self._number(base_model, dataclasses.replace(known.source, uncast=uncast))

    def renumber_without_file(self, base_model: Any) -> KnownModel:
        """Give a model a new number if it is not what its file holds, or not what it was."""
        known = self._known.get(base_model)
        if known is not None:
            self._gone.append(known.number)
        return self._number(base_model, None)

    def has_changed(self, known: KnownModel) -> bool:
        """Whether a model's file is not any more what ComfyUI read."""
        source = known.source
        return source is not None and file_identity(source.path) != source.file

    def follow_file(self, base_model: Any, known: KnownModel) -> KnownModel | Refusal:
        """Return a model as it is to be known now: one whose file has changed has none.

        What ComfyUI holds is then carried, unless it holds pages of the file itself: nobody can say
        what is in those pages.
        """
        if not self.has_changed(known):
            return known
        assert known.source is not None
        if is_mapped_here(known.source.path):
            return Refusal("the model's file was changed while ComfyUI reads from it")
        return self.renumber_without_file(base_model)

    def take_gone(self) -> list[int]:
        """Numbers of the models that ComfyUI has let go since the last call."""
        return [self._gone.pop() for _ in range(len(self._gone))]

    def _number(self, base_model: Any, source: ModelSource | None) -> KnownModel:
        known = self._known[base_model] = KnownModel(next(self._numbers), source)
        # Runs in any thread, in the middle of anything: it only leaves a note.
        weakref.finalize(base_model, self._gone.append, known.number).atexit = False
        return known


def flux_of(base_model: Any) -> Any:
    """Return the diffusion model itself, also where a compiled one stands in for it."""
    return original(base_model.diffusion_model)


def _dtypes(base_model: Any) -> list[str]:
    """What ComfyUI chose for its card; a worker's card may be of another kind."""
    if not hasattr(base_model, "get_dtype"):  # A ControlNet: no card changes what it is loaded as.
        return []
    compute = base_model.manual_cast_dtype
    return [str(base_model.get_dtype()), "" if compute is None else str(compute)]
