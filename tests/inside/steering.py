"""Bodies that steer how the ranks of this process share calls from now on.

Runs in: a ComfyUI process of ``process.py``.

``Host.holding`` is the door: its strategy and its balance are asked anew for every call. The ranks
stay as they are; settings that need other ranks are changed by ``rig_shim_door``.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import Any

_balances: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def _host() -> Any:
    return sys.modules["comfy_xdit_patch.host.guest.activation"].ACTIVATION.host


def use_strategy(text: str) -> None:
    """Share calls by this strategy."""
    from comfy_xdit_patch.planning.strategy import parse_strategy

    _host().holding.strategy = parse_strategy(text)


def use_weights(weights: list[int]) -> None:
    """Share calls by these weights, and go on from them; none are even ones."""
    host = _host()
    balance = host.pool.wait_until_ready(lambda: None).of(host.holding.balance)
    balance.current.weights = tuple(weights)
    balance.weights(host.begin_run())  # puts them into the status


def use_balance(name: str, mode: str) -> None:
    """Balance the ranks by the balance of this name, made new at first and for new ranks."""
    from comfy_xdit_patch.host.pace.rank_speeds import CrewBalance

    host = _host()
    balances = _balances.setdefault(host, {})
    if name not in balances:
        balances[name] = partial(CrewBalance, mode=mode, totals=host.totals)
    host.holding.balance = balances[name]
    crew = host.pool.wait_until_ready(lambda: None)
    crew.of(balances[name]).weights(host.begin_run())  # puts them into the status
