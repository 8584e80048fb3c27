"""Have the workers hold the weights that a call needs, and no others than ComfyUI's.

Runs in: host process.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.pool import BackOff
from comfy_xdit_patch.host.reading.comparing import (
    Comparison,
    Comparisons,
    is_patched_here,
    uncast,
    verify,
)
from comfy_xdit_patch.host.reading.models import KnownModel, ModelRegistry, flux_of
from comfy_xdit_patch.host.reading.weight_states import BypassHooks, WeightState, WeightStates
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.weights.residency import Placement
from comfy_xdit_patch.report.progress import load_bar
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import Loaded, NotLoaded, short
from comfy_xdit_patch.wire.messages.requests import Drop, GiveWay, Load, Residence, Unload
from comfy_xdit_patch.wire.packs import NoRoomError
from comfy_xdit_patch.wire.skeleton import describe
from comfy_xdit_patch.wire.tensors import ForeignTensorError
from comfy_xdit_patch.wire.values import UncarriedValueError

log = logging.getLogger("comfy_xdit_patch")

NOT_LOADED = Refusal("a worker could not load the model")
AFTER_LOAD_S = (0.0, 120.0, 600.0)
"""Wait before a load that failed is tried again, which costs its time in every run that does."""


@dataclass(frozen=True, slots=True)
class Held:
    """How every rank holds one model."""

    key: str
    """Of the state of its weights."""
    residence: Residence
    num_bytes: tuple[int, ...]
    """Size of the weights in use, by rank."""


class RemoteWeights:
    """What every rank of a crew holds: models by number, each in one state of its weights."""

    def __init__(
        self,
        crew: Crew,
        *,
        totals: Totals,
        models: ModelRegistry,
        failed: dict[tuple[int, str], BackOff],
        verifies: bool,
    ) -> None:
        """Prepare.

        Args:
            failed: loads that failed, by model and state. New ranks would meet the same.
            verifies: weights that ComfyUI patched are compared bit for bit (strict).
        """
        self._totals = totals
        self._models = models
        self._failed = failed
        self._verifies = verifies
        self.comparisons = Comparisons(crew.world_size)
        self._states = WeightStates(crew.packs)
        self.held: dict[int, Held] = {}
        """By a model's number."""
        self.may_hold_any = False
        """Whether the ranks may hold a model: one was asked for, and nothing unloaded since."""
        self.compared: weakref.WeakKeyDictionary[Run, set[tuple[int, str, str]]] = (
            weakref.WeakKeyDictionary()
        )
        """What was compared with ComfyUI's weights in a run."""
        self.displaced: set[int] = set()
        """Models that left a GPU with the worker that gave way, by number, until they return."""
        self.away: set[int] = set()
        """Ranks that gave way and have nothing more to give."""
        self.working_bytes: dict[int, int] = {}
        """What the last call of each model takes, by the model's number."""
        self.had_room: set[Any] = set()
        """Kinds of calls for which there was room."""

    def state(self, crew: Crew, base_model: Any, bypass: BypassHooks) -> WeightState | Refusal:
        """Return the state of the weights that the model's current ModelPatcher asks for."""
        written = crew.packs.bytes_written
        state = self._states.of(base_model, bypass)
        self._totals.bytes_weights += crew.packs.bytes_written - written
        return state

    def holds(self, known: KnownModel, residence: Residence, key: str | None = None) -> bool:
        """Whether every rank holds this model so, and in the state of this key."""
        held = self.held.get(known.number)
        return held is not None and held.residence == residence and key in (None, held.key)

    def state_key(self, known: KnownModel) -> str:
        """Name the state in which every rank holds this model; empty if none does."""
        held = self.held.get(known.number)
        return "" if held is None else held.key

    def comparison(self, known: KnownModel, state: WeightState) -> tuple[int, str]:
        """Name what is compared once a run: stored weights, or those in use in each state."""
        return known.number, state.key if self._verifies else ""

    def bytes_of(self, numbers: Collection[int]) -> int:
        """Size of what is held of these models together, on the rank that has most of it."""
        sizes = [held.num_bytes for number, held in self.held.items() if number in numbers]
        return max(map(sum, zip(*sizes, strict=True)), default=0)

    def lets_in(self, known: KnownModel, place: Placement, beside: Collection[int]) -> bool:
        """Whether a guest fits beside the models of its run that are held. If not, it is let go.

        Args:
            beside: numbers of all models of the run.
        """
        if place.leaves(self.bytes_of({*beside} - {known.number})):
            return True
        self.held.pop(known.number, None)
        return False

    def load(
        self,
        crew: Crew,
        base_model: Any,
        known: KnownModel,
        state: WeightState,
        placement: Placement,
        *,
        is_compared: bool,
        is_gathered: bool = False,
        poll: Poll,
    ) -> KnownModel | Refusal:
        """Have every rank hold this model in this state, and check that it is the host's.

        Args:
            is_compared: it was checked already; a hook's patches come and go in every step.
            is_gathered: the workers run its blocks alone.

        Returns:
            The model as the workers know it now; its number is new where the file is loaded with
            other weights uncast, and where the model is carried, as a node has changed it.

        Raises:
            WorkerError: the workers are lost.
        """
        try:
            if is_compared:
                replies = self._ask(crew, base_model, known, state, placement, None, poll)
                if isinstance(replies, Refusal):
                    return replies
                self._note(known, state, placement, replies)
                return known
            known = self._models.find_loaded(base_model, uncast(base_model))
            comparison = self.comparisons.begin(base_model, known.number)
            replies = self._ask(crew, base_model, known, state, placement, comparison, poll)
            if (
                not isinstance(replies, Refusal)
                and not comparison.agrees(replies, only_blocks=is_gathered)
                and hasattr(base_model, "model_config")  # what a model is rebuilt from
            ):
                known = self._models.renumber_without_file(base_model)
                replies = self._ask(crew, base_model, known, state, placement, comparison, poll)
        except (ForeignTensorError, UncarriedValueError) as error:
            return Refusal(f"the model has weights that cannot be carried: {error}")
        except NoRoomError as error:
            return Refusal(f"a model without a file does not fit in memory: {error}")
        if isinstance(replies, Refusal):
            return replies
        if not comparison.agrees(replies, only_blocks=is_gathered):
            return Refusal("the workers cannot rebuild the model that ComfyUI holds")
        found, whole = [reply.digests for reply in replies], not placement.residence.grid
        refusal = verify(base_model, found, self._totals, whole, only_blocks=is_gathered)
        if refusal is not None:
            return refusal
        self.comparisons.ended_well(known.number, comparison)
        self._note(known, state, placement, replies)
        return known

    def _note(
        self, known: KnownModel, state: WeightState, placement: Placement, replies: Sequence[Loaded]
    ) -> None:
        num_bytes = tuple(reply.bytes_held for reply in replies)
        self.held[known.number] = Held(state.key, placement.residence, num_bytes)

    def _ask(
        self,
        crew: Crew,
        base_model: Any,
        known: KnownModel,
        state: WeightState,
        placement: Placement,
        comparison: Comparison | None,
        poll: Poll,
    ) -> list[Loaded] | Refusal:
        verifies = comparison is not None and self._verifies
        verifies = verifies and is_patched_here(base_model.current_patcher)
        which = known.number, state.key
        if which in self._failed and not self._failed[which].is_over:
            return NOT_LOADED
        tensors = None
        if known.source is None and known.number not in self.held:
            packs = crew.packs
            written = packs.bytes_written
            tensors = describe(base_model, flux_of(base_model), packs)
            self._totals.bytes_weights += packs.bytes_written - written
        # Unknown until every rank has answered: the user may interrupt the wait.
        self.held.pop(known.number, None)
        self.may_hold_any = True
        bar = load_bar(crew.world_size, crew.device_word)
        with self._totals.loading(), bar as progress, crew.turn(poll) as turn:
            turn.send(
                Load(
                    request=turn.number,
                    model=known.number,
                    source=known.source,
                    tensors=tensors,
                    state=state.tree,
                    key=state.key,
                    residence=placement.residence,
                    room_bytes=placement.room_bytes,
                    verify=verifies,
                    look=[] if comparison is None else comparison.look,
                ),
                first=self._drop_messages(),
            )
            if comparison is not None:
                comparison.make()
            replies = turn.replies(progress)
        loaded = [reply for reply in replies if isinstance(reply, Loaded)]
        for rank, reply in enumerate(replies):
            if isinstance(reply, NotLoaded):
                error = f"Rank {rank} could not load the model: {short(reply.error)}"
                self._totals.failed(error)
                log.error("xDiT: %s", error)
                self._failed.setdefault(which, BackOff()).failed(AFTER_LOAD_S)
                return replace(NOT_LOADED, error=error)
            assert isinstance(reply, Loaded)
            self._totals.loaded(rank, reply.seconds)
            crew.weight_bytes[rank] = reply.bytes_held
        self._failed.pop(which, None)
        if loaded[0].is_new:
            self._totals.loads += 1
            log.info(
                "xDiT: model loaded on %d %s in %.1f s, %.2f GB of weights on each",
                len(loaded),
                crew.device_word,
                max(reply.seconds for reply in loaded),
                max(reply.bytes_held for reply in loaded) / 1e9,
            )
        everywhere = set.intersection(*(set(reply.models) for reply in loaded))
        self.held = {n: key for n, key in self.held.items() if n in everywhere}
        built = loaded[0].attributes if loaded[0].is_new else None
        return self.comparisons.not_as_built(base_model, known.number, built) or loaded

    def unload(self, crew: Crew) -> None:
        """Have every rank drop all models.

        Raises:
            WorkerError: the workers are lost.
        """
        self.held.clear()
        crew.weight_bytes.clear()
        crew.packs.drop_kept()
        with crew.turn(lambda: None) as turn:
            turn.ask(Unload(turn.number), first=self._drop_messages())
        self.may_hold_any = False

    def give_way(self, crew: Crew, ranks: Sequence[int]) -> None:
        """Have workers leave their device to ComfyUI; they return when they compute again.

        Raises:
            WorkerError: the workers are lost.
        """
        self._totals.gave_way += 1
        with crew.turn(lambda: None) as turn:
            turn.ask(GiveWay(turn.number, list(ranks)))
        self.displaced |= self.held.keys()
        self.away.update(ranks)

    def _drop_messages(self) -> Sequence[Message]:
        gone = self._models.take_gone()
        for number in gone:
            self.held.pop(number, None)
        return [Drop(gone)] if gone else []
