"""Model patches of nodes, on this rank's shard of the tokens.

Runs in: worker process.

    native     known to work on any part of the tokens: called with this rank's own
    gathered   not known: called on every rank with all tokens, in ComfyUI's order
    skip       blocks that a node leaves out

The trees come from ``host/reading/node_patches.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.wire.functions import decode_callable
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens

TOKEN_DIM_OF_HEADS = 2  # q, k, v and pe are (B, H, L, ...)


class PatchRefusedError(Exception):
    """A patch does something that cannot be shared; every rank says so at the same place."""


class Objects:
    """Objects of nodes that keep state from step to step, by the host's numbers."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}

    def get(self, number: int, make: Callable[[], Any]) -> Any:
        if number not in self._objects:
            self._objects[number] = make()
        return self._objects[number]

    def forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._objects.pop(number, None)


class ModelPatches:
    """The patches of one call."""

    def __init__(self, tree: Mapping[str, Any], objects: Objects) -> None:
        self._tree = tree
        self._objects = objects

    def options(self, tokens: RankTokens | None) -> dict[str, Any]:
        """Return the entries of ``transformer_options`` that apply the patches.

        Args:
            tokens: how to gather; None on a rank that has all of them.
        """
        patches: dict[str, list[Any]] = {}
        for mode, of_mode in self._tree["patches"].items():
            for kind, functions in of_mode.items():
                for function in functions:
                    patch = _guarded(self._decode(function))
                    if mode == "gathered" and tokens is not None:
                        patch = WRAPPERS[kind](patch, tokens)
                    patches.setdefault(kind, []).append(patch)
        options: dict[str, Any] = {**self._tree["options"]["values"], "patches": patches}
        if self._tree["skip"]:
            skipped = {(name, number): _skip for name, number in self._tree["skip"]}
            options["patches_replace"] = {"dit": skipped}
        for name in self._tree["options"]["missing"]:
            options[name] = Missing(name)
        return options

    @property
    def are_in_blocks(self) -> bool:
        """Whether blocks call some of them, beside an attention function."""
        kinds = {kind for of_mode in self._tree["patches"].values() for kind in of_mode}
        return bool(kinds & {*WRAPPERS})

    @property
    def attention(self) -> Any:
        """The user's own attention function, or None."""
        tree = self._tree["attention"]
        return None if tree is None else _guarded(self._decode(tree["function"]))

    def _decode(self, tree: Any) -> Any:
        try:
            return decode_callable(tree, self._objects.get)
        except Exception as error:
            raise PatchRefusedError(f"{type(error).__name__}: {error}") from error

    @property
    def wants_order(self) -> bool:
        """Whether the attention function may look at which token is where."""
        tree = self._tree["attention"]
        return tree is not None and bool(tree["wants_order"])


class Missing:
    """Stands for an option that could not be carried: a patch that uses it is refused."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise PatchRefusedError(f"it reads the option {self._name}")

    __getattr__ = __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __eq__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _guarded(patch: Any) -> Any:
    """A node's own error is no fault of a rank: the host runs the step and shows it."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return patch(*args, **kwargs)
        except PatchRefusedError:
            raise
        except Exception as error:
            raise PatchRefusedError(f"{type(error).__name__}: {error}") from error

    return guarded


def _skip(args: Any, _: Any) -> Any:
    return args


def _around_attention(patch: Any, tokens: RankTokens) -> Any:
    def attn1_patch(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pe: Any,
        attn_mask: Any,
        extra_options: Any,
    ) -> dict[str, Any]:
        dim = TOKEN_DIM_OF_HEADS
        given = {"q": q, "k": k, "v": v, "pe": pe}
        gathered = {
            name: None if value is None else tokens.gather(value, dim=dim)
            for name, value in given.items()
        }
        extra = _with_whole_image(extra_options, tokens.num_tokens, tokens)
        out = patch(**gathered, attn_mask=attn_mask, extra_options=extra)
        result: dict[str, Any] = {"attn_mask": out.get("attn_mask", attn_mask)}
        for name, before in gathered.items():
            after = out.get(name, before)
            if after is None:
                result[name] = None
                continue
            if before is None or after.shape[dim] != before.shape[dim]:
                raise PatchRefusedError("it changes the number of tokens in attention")
            result[name] = tokens.own(after, dim=dim)
        return result

    return attn1_patch


def _after_attention(patch: Any, tokens: RankTokens) -> Any:
    def attn1_output_patch(attn: torch.Tensor, extra_options: Any) -> torch.Tensor:
        gathered = tokens.gather(attn)
        out = patch(gathered, _with_whole_image(extra_options, tokens.num_tokens, tokens))
        if out.shape[1] != gathered.shape[1]:
            raise PatchRefusedError("it changes the number of tokens in attention")
        return tokens.own(out)

    return attn1_output_patch


def _with_whole_image(
    extra_options: Mapping[str, Any], length: int, tokens: RankTokens
) -> dict[str, Any]:
    """Say where the image's tokens are among all tokens."""
    return {**extra_options, "img_slice": [tokens.num_text_tokens, length]}


WRAPPERS = {"attn1_patch": _around_attention, "attn1_output_patch": _after_attention}
