"""Whether the ranks compute with what ComfyUI's process computes with.

Runs in: host process. Reads modules and classes, changes nothing.

A rank says what a model's code reaches and what each of these things is (``worker/reach.py``). Here
the same names are looked up: what is another thing here was replaced by somebody, and is refused
with its name. That is compared once for each crew of ranks; after that only identities are,
in every step, and what is not the same object any more is described and compared again. The first
look of a run comes before its first step, the others while the ranks compute: it takes a
millisecond to ask two thousand names that no cache of the processor holds. Settings of torch and of
ComfyUI's command line are not refused: they are sent, and the ranks follow. Where a late look finds
a change, the step is computed here, and the next one begins with a look.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.inheritance import plain_arguments
from comfy_xdit_patch.host.reading.compared import Compared
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.wire import torch_settings
from comfy_xdit_patch.wire.describing import codes_in, found
from comfy_xdit_patch.wire.messages.replies import Reached
from comfy_xdit_patch.wire.messages.requests import Follow, Reach

Classes: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
"""Those of a model's modules by ``module:path``: in its blocks, and around them."""
OfModel: TypeAlias = tuple[Compared, list[Refusal]]
"""What a model's code reaches, and what is different in classes without a name."""


class Likeness:
    """What the ranks of one crew have said, and what is different here."""

    def __init__(self, _: Crew) -> None:
        """Prepare: nothing was asked."""
        self._compared: dict[Classes, Compared] = {}
        self._kernels: frozenset[str] = frozenset()
        self._num_kernels = -1
        self._modes: list[str] = []
        self._sent: tuple[list[Any], dict[str, Any]] | None = None
        self._has_changed = False
        """Whether the last look of this run found something: the next one is no late one."""
        self._looking: Compared | None = None
        """What is looked at while the ranks compute."""
        self._follows = True
        """Whether the ranks had ComfyUI's settings at the last late look."""
        self._of_runs: weakref.WeakKeyDictionary[Run, dict[int, OfModel]] = (
            weakref.WeakKeyDictionary()
        )
        """By the identity of the model."""

    @property
    def compared(self) -> list[Compared]:
        """What was compared with these ranks, for each kind of model."""
        return list(self._compared.values())

    def changes(self, crew: Crew, call: Call) -> list[Refusal]:
        """See what was replaced here, and have the ranks follow settings. Every step.

        Where nothing was at the last look of this run, the next one is ``late_change``.

        Raises:
            WorkerError: the workers are lost.
        """
        model = call.model
        of_run = self._of_runs.setdefault(call.run, {})
        is_first = id(model) not in of_run
        if is_first or self._has_changed:
            self._follow(crew)
        if is_first:
            in_blocks, around = _classes_of(flux_of(model))
            classes = _paths(in_blocks), _paths(around - in_blocks)
            if classes not in self._compared:
                self._compared[classes] = Compared(self._ask(crew, classes, call.poll))
            of_run[id(model)] = self._compared[classes], _of_local_classes(in_blocks | around)
        compared, of_local_classes = of_run[id(model)]
        self._looking = None
        if is_first or self._has_changed:
            self._has_changed = bool(compared.changes(is_first=is_first))
        else:
            self._looking = compared
            crew.owed = partial(self._look, compared)
        return [
            *compared.found,
            *of_local_classes,
            *self._of_kernels(),
            *(
                Refusal(f"{mode} is active around the sampling", Scope.STEP)
                for mode in torch_settings.modes()
                if mode not in self._modes
            ),
        ]

    def late_change(self, crew: Crew) -> Refusal | None:
        """Return what was changed between this step's start and the one before, if anything was.

        Ranks have computed the step with what was there before.
        """
        crew.pay()
        looked_at, self._looking = self._looking, None
        if looked_at is None or (self._follows and not looked_at.found):
            return None
        self._has_changed = True
        if looked_at.found:
            return replace(looked_at.found[0], scope=Scope.STEP, is_around_blocks=False)
        return Refusal(
            "settings of torch or ComfyUI were changed in the middle of a run", Scope.STEP
        )

    def _look(self, compared: Compared) -> None:
        compared.changes(is_first=False)
        self._follows = self._sent == _settings()

    def _follow(self, crew: Crew) -> None:
        """Send settings if they are others than the ranks have."""
        now, options = _settings()
        if self._sent != (now, options):
            self._sent = now, dict(options)
            arguments = plain_arguments(options)
            crew.pending = [Follow(torch=torch_settings.current(), arguments=arguments)]

    def _ask(self, crew: Crew, classes: Classes, poll: Poll) -> Reached:
        in_blocks, around = classes
        with crew.turn(poll) as turn:
            replies = turn.ask(Reach(turn.number, list(in_blocks), list(around)))
        reached = replies[0]
        assert isinstance(reached, Reached)
        self._kernels, self._modes = frozenset(reached.kernels), reached.modes
        return reached

    def _of_kernels(self) -> list[Refusal]:
        if torch_settings.num_kernels() == self._num_kernels:
            return []
        others = sorted(torch_settings.own_kernels() - self._kernels)
        if not others:
            self._num_kernels = torch_settings.num_kernels()
        return [
            Refusal(f"torch's operator {name} was replaced by a torch.library") for name in others
        ]


def _settings() -> tuple[list[Any], dict[str, Any]]:
    """Return torch's settings and ComfyUI's options, those in the dict that ComfyUI changes."""
    import comfy.cli_args

    return torch_settings.values(), vars(comfy.cli_args.args)


def _classes_of(flux: Any) -> tuple[set[type[Any]], set[type[Any]]]:
    """Return the classes of the modules and weights in a model's blocks, and around them."""
    in_blocks: set[type[Any]] = set()
    around: set[type[Any]] = {type(flux)}
    for name, module in flux.named_modules():
        into = in_blocks if name.split(".")[0] in BLOCK_LISTS else around
        into.add(type(module))
        into.update(type(weight) for weight in module._parameters.values() if weight is not None)
    return in_blocks, around


def _paths(classes: Iterable[type[Any]]) -> tuple[str, ...]:
    """Name classes; those made inside of a function by that function, and what they inherit."""
    paths = set()
    for cls in classes:
        for one in cls.__mro__[:-1]:
            outer, _, inner = one.__qualname__.partition(".<locals>")
            paths.add(f"{one.__module__}:{outer}")
            if not inner:
                break
    return tuple(sorted(paths))


def _of_local_classes(classes: Iterable[type[Any]]) -> list[Refusal]:
    """See whether classes that ComfyUI makes inside of a function are as that function made them.

    Ranks make their own. Such a class has no name to compare, so its methods are looked for in the
    function's code.
    """
    refusals = []
    for cls in classes:
        outer, _, inner = cls.__qualname__.partition(".<locals>")
        if not inner or not cls.__module__.startswith("comfy."):
            continue
        function = found(f"{cls.__module__}:{outer}")
        codes = set(codes_in(function.__code__)) if hasattr(function, "__code__") else set()
        for name, value in vars(cls).items():
            code = getattr(value, "__code__", None)
            path = f"{cls.__name__}.{name}"
            if code is not None and code not in codes:
                refusals.append(Refusal(f"{path} was replaced by {origin(value)}"))
    return refusals
