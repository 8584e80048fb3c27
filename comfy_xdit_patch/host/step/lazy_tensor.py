"""A tensor whose numbers are not here until somebody needs them.

Runs in: host process.

To ComfyUI it is a tensor: it has shape, dtype and device. What is done to it is written down where
the ranks can do the same (``wire/recipes.py``). Anything else needs the numbers: they are had once,
and the object is an ordinary tensor from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

Lazy = TypeVar("Lazy", bound="LazyTensor")


class LazyTensor(torch.Tensor):
    """See the module. ``here`` are the numbers, or None."""

    here: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def empty(
        cls: type[Lazy], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Lazy:
        """Return a tensor of this class without numbers."""
        made: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device
        )
        made.here = None
        return made

    def compute(self) -> torch.Tensor:
        """Return the numbers, which are not here."""
        raise NotImplementedError

    @classmethod
    def record(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Write down what is done to tensors, or return None: the numbers are needed."""
        raise NotImplementedError

    def numbers(self) -> torch.Tensor:
        """Be an ordinary tensor, and return it."""
        if self.here is None:
            self.here = self.compute()
        return self.here

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        recorded = cls.record(func, args, kwargs)
        if recorded is not None:
            return recorded
        owners: dict[int, LazyTensor] = {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, LazyTensor):
                numbers = value.numbers()
                owners[id(numbers)] = value
                return numbers
            return value

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        # What was changed in place is still the same object for its holders.
        return tree_map(lambda value: owners.get(id(value), value), out)
