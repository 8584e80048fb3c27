"""Tensors in shared memory: the host's table and a worker's map in one process."""

from __future__ import annotations

import fcntl
import gc
import json
import os

import pytest
import torch

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire import slots as module
from comfy_xdit_patch.wire.slots import (
    SLOTS_A_PATH,
    SlotMap,
    SlotTable,
)
from comfy_xdit_patch.wire.values import UncarriedValueError


class Wire:
    """A host's table, a worker's map, and what goes from one to the other."""

    def __init__(self):
        self.table = SlotTable()
        self.map = SlotMap(torch.device("cpu"))
        self.num_created = 0
        self.dropped = []

    def send(self, path, value):
        self.table.begin_call()
        tree = self.table.place(path, value)
        self.deliver()
        return tree

    def carry(self, path, value):
        return self.map.fetch(self.send(path, value))

    def deliver(self):
        for slot, fd in self.table.take_created():
            self.map.add(slot.number, fd, slot.size_bytes)
            self.num_created += 1
        dropped = self.table.take_dropped()
        self.map.drop(dropped)
        self.dropped += dropped

    def written_by(self, path, value):
        before = self.table.bytes_written
        self.send(path, value)
        return self.table.bytes_written - before


@pytest.fixture
def wire():
    return Wire()


def slot_of(tree):
    return tree["$slot"][0]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_a_tensor_of_any_dtype_arrives_as_it_is(wire, dtype):
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    received = wire.carry("x", tensor)
    assert received.dtype == dtype
    assert torch.equal(received.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.rand(4, 6).t(),
        torch.rand(8)[::2],
        torch.rand(3, 1).expand(3, 5),
        torch.nn.Parameter(torch.rand(3)),
        torch.rand(3, requires_grad=True),
        torch._neg_view(torch.rand(3)),
    ],
    ids=[
        *("no axes", "no elements", "transposed", "strided", "expanded", "parameter", "with grad"),
        "negated when read",
    ],
)
def test_a_tensor_of_any_layout_arrives_as_it_is(wire, tensor):
    received = wire.carry("x", tensor)
    assert received.shape == tensor.shape
    assert torch.equal(received, tensor.detach())


def test_what_the_worker_sees_is_the_memory_that_the_host_wrote(wire):
    first = wire.carry("y", torch.zeros(4))
    for _ in range(SLOTS_A_PATH):  # until the first slot comes round again
        wire.send("y", torch.rand(4))
    wire.send("y", torch.ones(4))
    assert not torch.equal(first, torch.zeros(4))


def test_the_same_bytes_in_a_new_tensor_are_not_written_again(wire):
    tensor = torch.rand(100, 100)
    first = wire.send("context", tensor)
    assert wire.table.bytes_written == tensor.nbytes
    assert wire.written_by("context", tensor.clone()) == 0
    assert wire.send("context", tensor.clone()) == first


def test_only_the_argument_that_changed_is_written(wire):
    arguments = {"x": torch.rand(64), "context": torch.rand(1000)}
    wire.send("call", arguments)
    arguments["x"] = torch.rand(64)
    assert wire.written_by("call", arguments) == 64 * 4


@pytest.mark.parametrize("position", [0, 50_000, 99_999])
def test_one_changed_element_is_noticed_wherever_it_is(wire, position):
    tensor = torch.rand(100_000)
    wire.send("x", tensor)
    tensor[position] += 1
    assert torch.equal(wire.carry("x", tensor), tensor)
    assert wire.table.bytes_written == 2 * tensor.nbytes
    assert wire.written_by("x", tensor.clone()) == 0


def test_a_changed_tensor_never_arrives_under_a_slot_and_version_used_before(wire):
    seen = {tuple(wire.send("x", torch.full((8,), float(n)))["$slot"][:2]) for n in range(20)}
    assert len(seen) == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_values_that_compare_oddly_are_compared_by_their_bytes(wire, value):
    wire.send("x", torch.full((8,), value))
    assert wire.written_by("x", torch.full((8,), value)) == 0


def test_a_tensor_that_is_negated_when_it_is_read_is_not_its_own_opposite(wire):
    tensor = torch.rand(8)
    wire.send("context", tensor)
    negated = torch._neg_view(tensor)
    assert torch.equal(wire.carry("context", negated), -tensor)
    found = [module.are_same_bytes(negated, other).item() for other in (tensor, -tensor)]
    assert found == [False, True], "as tensors on a device are compared"


def test_zero_and_minus_zero_are_not_the_same_bytes(wire):
    wire.send("x", torch.tensor([0.0]))
    assert wire.written_by("x", torch.tensor([-0.0])) == 4


@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, 8), torch.zeros(16, dtype=torch.int32), torch.zeros(8)],
    ids=["shape", "dtype", "length"],
)
def test_equal_bytes_of_another_shape_or_dtype_are_another_tensor(wire, other):
    wire.send("x", torch.zeros(16))
    received = wire.carry("x", other)
    assert (received.shape, received.dtype) == (other.shape, other.dtype)


def test_conditions_that_alternate_are_written_once_each(wire):
    conditions = [torch.full((100,), float(n)) for n in range(SLOTS_A_PATH)]
    for condition in conditions:
        wire.send("context", condition)
    for condition in conditions * 5:
        assert wire.written_by("context", condition.clone()) == 0
    assert wire.num_created == SLOTS_A_PATH


def test_the_slot_that_was_used_longest_ago_is_the_one_written_over(wire):
    tensors = [torch.full((8,), float(n)) for n in range(SLOTS_A_PATH)]
    slots = [slot_of(wire.send("y", tensor)) for tensor in tensors]
    wire.send("y", tensors[0])  # now the second one is the oldest
    assert slot_of(wire.send("y", torch.full((8,), 99.0))) == slots[1]
    assert wire.written_by("y", tensors[0]) == 0
    assert wire.written_by("y", tensors[1]) == 32


def test_of_what_every_step_has_anew_one_is_kept(wire):
    slots = {slot_of(wire.send("x", torch.rand(8))) for _ in range(5)}
    assert len(slots) == 1
    same = torch.rand(8)  # as the second condition of a step has it
    wire.send("x", same)
    assert wire.written_by("x", same.clone()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("name", ["timestep", "guidance"])
def test_numbers_travel_in_the_message_with_all_their_bits(wire, name, dtype):
    numbers = torch.tensor([0.1, -0.0, 3.0]).to(dtype)
    tree = json.loads(json.dumps(wire.send(name, numbers)))
    received = wire.map.fetch(tree)
    assert (received.dtype, received.shape) == (dtype, numbers.shape)
    assert torch.equal(received.view(torch.uint8), numbers.view(torch.uint8))
    assert wire.num_created == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_travels_too(wire, number):
    received = wire.carry("timestep", torch.tensor(number))
    assert received.shape == ()
    assert torch.equal(received.view(torch.int32), torch.tensor(number).view(torch.int32))


def test_a_number_for_each_token_does_not_travel_in_the_message(wire):
    per_token = torch.rand(1, 4096)
    assert torch.equal(wire.carry("timestep", per_token), per_token)
    assert wire.num_created == 1


@pytest.mark.parametrize("first", [False, True])
def test_a_slot_is_viewed_once_and_written_to_in_any_mode(wire, first):
    with torch.inference_mode(first):
        received = wire.carry("x", torch.rand(8))
    for mode in (not first, first):
        tensor = torch.rand(8)
        with torch.inference_mode(mode):
            assert wire.carry("x", tensor) is received
        assert torch.equal(received, tensor)


def test_paths_do_not_share_slots(wire):
    tensor = torch.rand(8)
    assert slot_of(wire.send("x", tensor)) != slot_of(wire.send("y", tensor))


def test_an_outgrown_slot_is_given_up_on_both_sides(wire):
    small = [slot_of(wire.send("y", torch.full((8,), float(n)))) for n in range(SLOTS_A_PATH)]
    large = torch.rand(100_000)
    assert torch.equal(wire.carry("y", large), large)
    assert wire.dropped == [small[0]]
    with pytest.raises(KeyError):
        wire.map[small[0]]
    assert wire.written_by("y", torch.full((8,), 1.0)) == 0  # the others are still there


def test_a_smaller_tensor_reuses_a_larger_slot(wire):
    for n in range(SLOTS_A_PATH):
        wire.send("y", torch.full((5000,), float(n)))
    received = wire.carry("y", torch.full((3,), 7.0))
    assert torch.equal(received, torch.full((3,), 7.0))
    assert wire.num_created == SLOTS_A_PATH
    assert wire.dropped == []


def test_memory_is_not_asked_for_without_end(wire):
    for n in range(200):
        wire.send("x", torch.rand(1 + n % 50))
    assert wire.num_created - len(wire.dropped) <= SLOTS_A_PATH


def test_trees_of_plain_values_and_tensors_arrive_as_they_are(wire):
    tree = {
        "refs": [torch.ones(2), [torch.zeros(3), None]],
        "rope": {"scale": 1.5, "on": True, "name": "index", "count": 3},
        "none": None,
        "empty": [{}, []],
    }
    received = wire.carry("options", tree)
    assert torch.equal(received["refs"][0], torch.ones(2))
    assert torch.equal(received["refs"][1][0], torch.zeros(3))
    assert received["refs"][1][1] is None
    assert received["rope"] == tree["rope"]
    assert (received["none"], received["empty"]) == (None, [{}, []])


def test_collections_arrive_as_what_they_are(wire):
    value = (1, [2, ("three", {4})], {5: torch.float32, "$six": None})
    assert wire.carry("x", value) == value


class Number(float):
    pass


class Names(list):
    pass


def test_numbers_and_collections_of_other_classes_arrive_as_plain_ones(wire):
    arrived = wire.carry("x", Names([Number(1.5), torch.ones(2)]))
    assert type(arrived) is list
    assert type(arrived[0]) is float
    assert torch.equal(arrived[1], torch.ones(2))


class MyTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "x is a object"),
        (b"bytes", "x is a bytes"),
        (1j, "x is a complex"),
        (torch.ones(2).numpy(), "x is a ndarray"),
        (torch.eye(2).to_sparse(), "x is a Tensor"),
        (torch.ones(2).as_subclass(MyTensor), "x is a MyTensor"),
        ([0, {"deep": object()}], "x.1.deep is a object"),
    ],
)
def test_any_other_value_is_refused_by_name(wire, value, named):
    with pytest.raises(UncarriedValueError, match=f"^{named}$"):
        wire.table.place("x", value)


def test_a_worker_writes_results_that_the_host_reads(wire):
    slot = wire.table.result_slot(4 * 1024)
    wire.deliver()
    wire.map[slot.number].view(torch.float32, (32, 32)).copy_(torch.eye(32))
    assert torch.equal(slot.view(torch.float32, (32, 32)), torch.eye(32))


def test_the_result_slot_is_kept_until_it_is_too_small(wire):
    first = wire.table.result_slot(10_000)
    assert wire.table.result_slot(5_000) is first
    second = wire.table.result_slot(100_000)
    assert second is not first
    assert second.size_bytes >= 100_000
    wire.deliver()
    assert wire.dropped == [first.number]


def handed_out(slot, value):
    slot.view(torch.float32, (4, 4)).fill_(value)
    return slot.handed_out(torch.float32, (4, 4), torch.device("cpu"))


def test_a_result_in_cpu_memory_is_the_slot_itself(wire):
    slot = wire.table.result_slot(64)
    result = handed_out(slot, 1.0)
    assert result.data_ptr() == slot.view(torch.float32, (4, 4)).data_ptr()
    assert torch.equal(result, torch.ones(4, 4))


@pytest.mark.parametrize(
    "part", [lambda r: r, lambda r: r[1:, 1:], lambda r: r.untyped_storage(), torch.Tensor.numpy]
)
def test_a_slot_is_not_written_to_for_as_long_as_somebody_has_a_part_of_its_result(wire, part):
    slot = wire.table.result_slot(64)
    kept = [part(handed_out(slot, 1.0))]
    gc.collect()
    other = wire.table.result_slot(64)
    assert other is not slot
    kept.clear()
    gc.collect()
    assert wire.table.result_slot(64) is slot, "the first one that is spare"


def test_results_that_are_used_at_once_have_slots_that_are_used_again(wire):
    numbers = []
    for _ in range(3):
        results = []
        for value in (1.0, 2.0):  # cond and uncond
            slot = wire.table.result_slot(64)
            numbers.append(slot.number)
            results.append(handed_out(slot, value))
        assert [result[0, 0].item() for result in results] == [1.0, 2.0]
        del results
        gc.collect()
    assert numbers == [0, 1] * 3
    wire.deliver()
    assert wire.dropped == []


def test_slots_of_results_that_were_kept_for_long_are_given_up(wire):
    results = [handed_out(wire.table.result_slot(64), float(n)) for n in range(8)]
    assert [result[0, 0].item() for result in results] == list(range(8))
    del results
    gc.collect()
    slot = wire.table.result_slot(64)
    wire.deliver()
    assert slot.number == 0
    assert wire.dropped == list(range(2, 8))


def test_a_result_outlives_the_table(wire):
    result = handed_out(wire.table.result_slot(64), 3.0)
    wire.table = None
    gc.collect()
    assert torch.equal(result, torch.full((4, 4), 3.0))


def test_a_result_larger_than_its_slot_is_an_error(wire):
    slot = wire.table.result_slot(4096)
    with pytest.raises(MessageError, match=r"^4100 bytes do not fit slot 0\.$"):
        slot.handed_out(torch.float32, (1025,), torch.device("cpu"))
    assert not slot.is_lent


def test_a_view_larger_than_its_slot_is_an_error(wire):
    slot = wire.table.result_slot(4096)
    wire.deliver()
    assert slot.view(torch.uint8, (4096,)).numel() == 4096
    with pytest.raises(MessageError, match=r"^4100 bytes do not fit slot 0\.$"):
        slot.view(torch.float32, (1025,))


def test_new_slots_and_given_up_slots_are_reported_once(wire):
    wire.send("x", torch.rand(4))
    assert wire.table.take_created() == []
    assert wire.table.take_dropped() == []


def test_slots_have_no_name_in_the_file_system_and_end_with_their_owners():
    num_fds = len(os.listdir("/proc/self/fd"))
    wire = Wire()
    wire.send("x", torch.rand(4))
    wire.send("y", torch.rand(4))
    assert len(os.listdir("/proc/self/fd")) > num_fds
    assert not [name for name in os.listdir("/dev/shm") if "xdit" in name]
    del wire
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == num_fds


@pytest.fixture
def device(monkeypatch):
    """Tensors count as a GPU's; ``device`` counts how often an answer of the GPU is waited for."""
    waits = []
    monkeypatch.setattr(module, "_is_on_device", lambda _: True)

    def noted(function):
        return lambda *args: (waits.append(function), function(*args))[1]

    monkeypatch.setattr(torch, "equal", noted(torch.equal))
    for name in ("tolist", "item", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    return waits


def placed_on_device(table, values):
    table.begin_call()
    table.look_for(values)
    before = table.bytes_written
    tree = {path: table.place(path, value) for path, value in values.items()}
    return tree, table.bytes_written - before


def test_all_tensors_of_a_device_are_compared_for_one_answer(device):
    table = SlotTable()
    values = {"x": torch.rand(8), "context": torch.rand(5, 3), "refs": [torch.rand(2), None]}
    _, written = placed_on_device(table, values)
    assert written == sum(t.nbytes for t in (values["x"], values["context"], values["refs"][0]))
    assert not device, "no slot could have held any of them"
    again = {"x": torch.rand(8), "context": values["context"].clone(), "refs": values["refs"]}
    _, written = placed_on_device(table, again)
    assert written == again["x"].nbytes, "x alone is new in each step"
    assert len(device) == 1


def test_each_tensor_of_a_device_is_found_among_those_that_are_kept(device):
    table = SlotTable()
    conds = [torch.rand(3, 2) for _ in range(SLOTS_A_PATH)]
    slots = [placed_on_device(table, {"context": c})[0]["context"] for c in conds]
    for cond, slot in zip(conds, slots, strict=True):
        assert placed_on_device(table, {"context": cond.clone()}) == ({"context": slot}, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_bytes_and_not_values_of_a_device_are_compared(device, dtype):
    table = SlotTable()
    value = torch.tensor([0.0, float("nan")]).to(dtype)
    assert placed_on_device(table, {"y": value})[1] == value.nbytes
    assert placed_on_device(table, {"y": value.clone()})[1] == 0, "a NaN is itself"
    other = torch.tensor([-0.0, float("nan")]).to(dtype)
    assert placed_on_device(table, {"y": other})[1] == value.nbytes, "-0.0 is not 0.0"


@pytest.mark.parametrize(
    "make", [lambda: torch.tensor(3.5), lambda: torch.arange(12.0).view(3, 4).T]
)
def test_numbers_and_transposed_tensors_of_a_device_are_compared_too(device, make):
    table = SlotTable()
    assert placed_on_device(table, {"guidance": make()})[1] == make().nbytes
    assert placed_on_device(table, {"guidance": make()})[1] == 0


def test_a_tensor_that_many_blocks_share_is_sent_once_in_a_call(wire):
    shared = torch.rand(100)
    before = wire.table.bytes_written
    tree = wire.send("control", {"input": [shared, None, shared], "output": [shared.clone()]})
    assert tree["input"][0] == tree["input"][2]
    assert slot_of(tree["output"][0]) != slot_of(tree["input"][0]), "known by identity, not content"
    assert wire.table.bytes_written - before == 2 * shared.nbytes
    arrived = wire.map.fetch(tree)
    assert torch.equal(arrived["input"][2], shared)
    assert arrived["input"][1] is None


def test_of_large_tensors_one_is_kept(wire):
    slots = {
        slot_of(wire.send("control", torch.full((module.LARGE_BYTES // 4 + 1,), float(i))))
        for i in range(3)
    }
    assert len(slots) == 1


def test_no_process_can_change_the_size_of_a_slot():
    """A slot that shrinks under a mapping is a bus error for whoever reads it."""
    table = SlotTable()
    table.create(100_000)
    ((slot, fd),) = table.take_created()
    for size in (0, slot.size_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):  # nor can the seals be added to
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)
