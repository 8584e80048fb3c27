"""The settings of a running process: the environment's, and what was asked for since.

Runs in: host process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.settings import given, read_settings
from comfy_xdit_patch.variables import VARIABLES

if TYPE_CHECKING:
    from comfy_xdit_patch.host.guest.activation import Activation

CHANGE = "a change of settings"


class Steering:
    """Other settings for a process that is active, all of them or none."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self._given: dict[str, str] = {}
        """Values that hold in the place of the environment's."""
        self._asking = threading.Lock()

    def ask(self, wanted: Mapping[str, Any]) -> bool:
        """Have other values of variables, from the next prompt on; the rest stays as it is.

        Args:
            wanted: by name; None is the environment's value again. They replace what waits.

        Returns:
            Whether they hold already. Otherwise they wait for the end of the prompt that runs.

        Raises:
            SettingsError: a name or a value is not legal, or values do not fit; nothing changes.
        """
        with self._asking:
            texts = {name: _text(name, value) for name, value in wanted.items()}
            texts = {name: value for name, value in (self._given | texts).items() if value}
            settings = read_settings(given(texts))
            devices = self._activation.devices_for(settings)

            def apply() -> None:
                self._activation.change(devices, settings)
                self._given = texts

            return self._activation.between.do(CHANGE, apply, texts)

    def to_dict(self) -> dict[str, Any]:
        """All variables: values of now, of the environment, and to come (None: no other)."""
        waiting = self._activation.between.waiting(CHANGE)
        environment, now = given({}), given(self._given)
        then = now if waiting is None else given(waiting)
        variables = {
            name: {
                "value": now[name],
                "environment": environment[name],
                "pending": None if then[name] == now[name] else then[name],
                "default": variable.default,
                "legal": variable.legal,
                "is_changeable": variable.is_changeable,
            }
            for variable in VARIABLES
            for name in (variable.name,)
        }
        return {
            "refused": self._activation.refused,
            "is_pending": waiting is not None,
            "variables": variables,
        }


def _text(name: str, value: Any) -> str:
    """What a user would write into the variable; empty for the environment's value.

    Raises:
        SettingsError: there is none of this name that can be changed, or the value is no text.
    """
    variable = next((variable for variable in VARIABLES if variable.name == name), None)
    if variable is None:
        names = ", ".join(known.name for known in VARIABLES if known.is_changeable)
        raise SettingsError(f"{name} is not a setting of ours. Those that can change are {names}.")
    if not variable.is_changeable:
        raise SettingsError(f"{name} is read when ComfyUI starts, and cannot be changed later.")
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise SettingsError(f"{name}={value!r} is not legal. Legal: {variable.legal}.")
    return str(value).strip()
