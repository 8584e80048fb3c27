"""Have a thread's calls of torch work on emulated cards.

Runs in: every process of a rig server with emulated cards.

Two modes: one of functions, for what torch would do with CUDA before it dispatches, and one of
ATen calls, for the rest. Facts that shaped it:

- modes belong to a thread, so each thread enters them;
- modules get new parameters where they would assign ``.data``.
"""

from __future__ import annotations

from typing import Any

import emulated_graphs as graphs
import torch
from emulated_tensors import Emulated, call, real
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class Dispatch(TorchDispatchMode):
    """Sees every ATen call, factories too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        for item in flat:
            # A quantised tensor takes itself apart; its parts come here again.
            if isinstance(item, torch.Tensor) and _has_its_own_way(type(item)):
                with self:
                    return type(item).__torch_dispatch__(func, types, args, kwargs)
        for item in flat:
            if isinstance(item, Emulated) or (
                isinstance(item, torch.device) and item.type == "cuda"
            ):
                return call(func, args, kwargs)
        return func(*args, **kwargs)


def _has_its_own_way(cls: type) -> bool:
    ways = (torch.Tensor.__torch_dispatch__, Emulated.__torch_dispatch__)
    return all(cls.__torch_dispatch__ != way for way in ways)  # type: ignore[attr-defined]


class Functions(TorchFunctionMode):
    """Sees what would look for CUDA before it dispatches."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                return func(*args, **{**kwargs, "device": None}).to(device)
        elif func is torch.nn.functional.scaled_dot_product_attention:
            where = [t.where for t in tree_flatten((args, kwargs))[0] if isinstance(t, Emulated)]
            if where:
                plain = tree_map(real, args), tree_map(real, kwargs)
                return Emulated(graphs.launch(func, *plain), where[0])
        elif func == torch.Tensor.data.__set__ and isinstance(args[1], Emulated):
            new = args[1].detach()
            if isinstance(args[0], torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=args[0].requires_grad)
            torch.utils.swap_tensors(args[0], new)
            return None
        elif args and isinstance(args[0], Emulated):
            return _of_a_card(func, args, kwargs)
        return func(*args, **kwargs)


def _of_a_card(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a method of a card's tensor."""
    tensor = args[0]
    if func is torch.Tensor.new_tensor:
        return torch.tensor(args[1], dtype=kwargs.get("dtype", tensor.dtype)).to(tensor.device)
    if func == torch.Tensor.data.__get__:
        return tensor.detach()
    if func is torch.Tensor.tolist:
        graphs.forbid("a list is the host's")
    if func in (torch.Tensor.data_ptr, torch.Tensor.tolist):
        return func(tensor.inner)
    if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):

        def index(item: Any) -> Any:
            is_list = isinstance(item, (list, range))
            return torch.tensor(list(item)).to(tensor.device) if is_list else item

        key = tuple(map(index, args[1])) if isinstance(args[1], tuple) else index(args[1])
        return func(tensor, key, *args[2:])
    return func(*args, **kwargs)


def enter() -> None:
    """Have this thread compute under both modes."""
    Functions().__enter__()
    Dispatch().__enter__()
