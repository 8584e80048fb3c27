"""What a fingerprint sees, and what it does not."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.wire import fingerprint as module
from comfy_xdit_patch.wire.fingerprint import NUM_SAMPLES, Fingerprint, Look
from comfy_xdit_patch.wire.tensors import ForeignTensorError


class OtherLinear(torch.nn.Linear):
    pass


class Flux(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dtype = torch.float32
        self.inner = torch.nn.Linear(40, 5)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.arange(100.0))
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))


SAMPLED, WHOLE = Look(seed=1), Look(seed=1, parts=1)


def fingerprint(model, *, patcher=None, look=SAMPLED):
    made = Fingerprint(
        model.diffusion_model, manual_cast_dtype=model.manual_cast_dtype, patcher=patcher
    )
    return made.of(look)


def model():
    return SimpleNamespace(diffusion_model=Flux(), manual_cast_dtype=None)


def test_equal_models_have_equal_fingerprints():
    assert fingerprint(model()) == fingerprint(model())
    parts = fingerprint(model()).split("-")
    assert [len(part) for part in parts] == [hashlib.sha256().digest_size * 2] * 2


def test_blocks_agree_whatever_lies_around_them():
    def with_block(**changes):
        changed = model()
        changed.diffusion_model.double_blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3)])
        torch.nn.init.ones_(changed.diffusion_model.double_blocks[0].weight)
        torch.nn.init.zeros_(changed.diffusion_model.double_blocks[0].bias)
        for name, part in changes.items():
            changed.diffusion_model.set_submodule(name, part)
        return fingerprint(changed)

    plain, around = with_block(), with_block(inner=torch.nn.Identity())
    assert module.agree(around, plain, only_blocks=True)
    assert not module.agree(around, plain, only_blocks=False)
    inside = with_block(**{"double_blocks.0": torch.nn.Linear(3, 3)})
    assert not module.agree(inside, plain, only_blocks=True)


def change_dtype_choice(m):
    m.diffusion_model.dtype = torch.bfloat16


def change_cast_choice(m):
    m.manual_cast_dtype = torch.bfloat16


def change_weights_dtype(m):
    m.diffusion_model.inner.to(torch.bfloat16)


def change_operations(m):
    m.diffusion_model.inner.__class__ = OtherLinear


def add_a_module(m):
    m.diffusion_model.extra = torch.nn.Identity()


def reshape_a_weight(m):
    inner = m.diffusion_model.inner
    inner.weight = torch.nn.Parameter(inner.weight.detach().reshape(5, 8, 5))


def rename_a_buffer(m):
    flux = m.diffusion_model
    flux.register_buffer("list", flux.table)
    del flux.table


def edit_the_first_element(m):
    m.diffusion_model.inner.weight.data[0, 0] += 1e-6


def edit_the_last_element(m):
    m.diffusion_model.inner.weight.data[-1, -1] += 1e-6


def scale_all_of_a_weight(m):
    m.diffusion_model.inner.weight.data.mul_(1.001)


def edit_a_buffer(m):
    m.diffusion_model.table[-1] = 0


def edit_a_scalar(m):
    m.diffusion_model.scale.data.fill_(2)


@pytest.mark.parametrize(
    "change",
    [
        change_dtype_choice,
        change_cast_choice,
        change_weights_dtype,
        change_operations,
        add_a_module,
        reshape_a_weight,
        rename_a_buffer,
        edit_the_first_element,
        edit_the_last_element,
        scale_all_of_a_weight,
        edit_a_buffer,
        edit_a_scalar,
    ],
    ids=lambda change: change.__name__.replace("_", " "),
)
def test_a_change_of_this_kind_is_seen(change):
    changed = model()
    change(changed)
    assert fingerprint(changed) != fingerprint(model())


LARGE = (1024, 512)


def large():
    made = model()
    generator = torch.Generator().manual_seed(1)
    made.diffusion_model.register_buffer("large", torch.randn(LARGE, generator=generator))
    return made


def edit(part, *, way):
    changed = large()
    way(changed.diffusion_model.large[part])
    return changed


def through_numpy(part):
    part.numpy()[...] -= 1


PARTS = {
    "an element": (700, slice(333, 334)),
    "a row": 700,
    "a column": (slice(None), 333),
    "a head": slice(700, 764),
    "one bit": (700, slice(333, 334)),
}
WAYS = {
    "in place": lambda part: part.mul_(2),
    "through data": lambda part: part.data.add_(1),
    "through numpy": through_numpy,
    "its sign": lambda part: part.neg_(),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_look_at_the_whole_sees_every_edit(part, way):
    assert fingerprint(edit(part, way=way), look=WHOLE) != fingerprint(large(), look=WHOLE)


def test_rows_that_changed_places_are_seen():
    changed = large()
    weight = changed.diffusion_model.large
    weight[[3, 700]] = weight[[700, 3]]
    assert fingerprint(changed, look=WHOLE) != fingerprint(large(), look=WHOLE)


@pytest.mark.parametrize(
    ("part", "odds"),
    [
        ("a head", 1.0),
        ("a column", 1 - (1 - 1 / 512) ** NUM_SAMPLES),
        ("a row", 1.0),
        ("an element", NUM_SAMPLES / (1024 * 512)),
    ],
)
def test_a_look_at_samples_sees_an_edit_with_the_odds_that_are_stated(part, odds):
    """Every run of ``size / NUM_SAMPLES`` elements is cut by the edge of a piece, or is one."""
    changed, plain = edit(PARTS[part], way=WAYS["its sign"]), large()
    looks = [Look(seed) for seed in range(60)]
    seen = sum(fingerprint(changed, look=look) != fingerprint(plain, look=look) for look in looks)
    assert abs(seen / 60 - odds) < 0.1


def test_several_who_look_at_their_parts_see_the_whole_together():
    changed = large()
    changed.diffusion_model.large[700, 333] += 1
    for parts in (1, 2, 3, 7):
        looks = [Look(5, parts, part) for part in range(parts)]
        differ = [fingerprint(changed, look=k) != fingerprint(large(), look=k) for k in looks]
        assert sum(differ) == 1, "one of them has read that tensor whole"


def test_what_was_written_to_is_known_where_torch_counts_that():
    plain = large()
    before = Fingerprint(plain.diffusion_model, manual_cast_dtype=None).versions
    plain.diffusion_model.large[5] *= 2
    assert Fingerprint(plain.diffusion_model, manual_cast_dtype=None).versions != before
    with torch.inference_mode():
        made = large()
        versions = Fingerprint(made.diffusion_model, manual_cast_dtype=None).versions
    assert set(versions) == {0}, "tensors made in inference mode count nothing"


class QuantisedTensor(torch.Tensor):
    pass


def test_a_weight_of_a_foreign_class_is_refused_by_name():
    changed = model()
    weight = torch.rand(3).as_subclass(QuantisedTensor)
    weight.table = object()
    changed.diffusion_model.register_buffer("quantised", weight)
    with pytest.raises(ForeignTensorError, match=r"^QuantisedTensor$"):
        fingerprint(changed)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.bool])
def test_weights_of_every_plain_dtype_have_a_fingerprint(dtype):
    one, other = model(), model()
    one.diffusion_model.register_buffer("extra", torch.zeros(50).to(dtype))
    other.diffusion_model.register_buffer("extra", torch.ones(50).to(dtype))
    assert fingerprint(one) != fingerprint(other)


def test_what_lies_under_a_lora_and_under_a_hook_is_the_stored_weight():
    stored, with_lora = torch.zeros(1), torch.ones(1)
    patcher = SimpleNamespace(
        backup={"both": SimpleNamespace(weight=stored)},
        hook_backup={"both": (with_lora, "cpu"), "hook": (stored, "cpu")},
    )
    assert module.unpatched(patcher) == {"both": stored, "hook": stored}
    assert module.unpatched(SimpleNamespace(backup={})) == {}


def on_a_dynamic_host(m, **dtypes):
    """Have a model's own weights stored in other dtypes than those that it computes with."""
    inner = m.diffusion_model.inner
    for name, dtype in dtypes.items():
        tensor = getattr(inner, name).detach()
        setattr(inner, f"{name}_comfy_model_dtype", tensor.dtype)
        setattr(inner, name, torch.nn.Parameter(tensor.to(dtype), requires_grad=False))
    return SimpleNamespace(is_dynamic=lambda: True, backup={})


def test_the_order_in_which_weights_and_modules_were_registered_does_not_matter():
    changed = model()
    flux = changed.diffusion_model
    inner, scale = flux.inner, flux.scale
    weight, bias = inner.weight, inner.bias
    del inner.weight, inner.bias, flux.inner, flux.scale
    inner.bias, inner.weight = bias, weight
    flux.scale, flux.last, flux.inner = scale, torch.nn.Identity(), inner
    plain = model()
    plain.diffusion_model.last = torch.nn.Identity()
    assert [name for name, _ in flux.named_parameters()] != [
        name for name, _ in plain.diffusion_model.named_parameters()
    ]
    assert fingerprint(changed) == fingerprint(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dynamic_hosts_weights_count_in_the_dtype_that_it_computes_with(dtype):
    host = model()
    patcher = on_a_dynamic_host(host, weight=dtype, bias=dtype)
    found = fingerprint(host, patcher=patcher)
    assert found == fingerprint(model())
    by_name = {w.name: w for w in module.stored_weights(host.diffusion_model, patcher)}
    assert list(by_name) == sorted(by_name)
    weight = by_name["inner.weight"]
    assert weight.dtype == torch.float32
    assert weight.num_bytes == 4 * 200
    assert weight.cast(weight.parts[0][""]).equal(model().diffusion_model.inner.weight)


def test_on_other_hosts_the_tensors_that_a_node_put_there_count_as_they_are():
    host = model()
    patcher = on_a_dynamic_host(host, weight=torch.float64)
    patcher.is_dynamic = lambda: False
    found = fingerprint(host, patcher=patcher)
    assert found != fingerprint(model())


def test_what_was_patched_on_a_dynamic_host_counts_as_it_was_stored():
    host = model()
    patcher = on_a_dynamic_host(host, weight=torch.float64)
    inner = host.diffusion_model.inner
    patcher.backup = {"diffusion_model.inner.weight": SimpleNamespace(weight=inner.weight)}
    inner.weight = torch.nn.Parameter(torch.zeros(5, 40))
    found = fingerprint(host, patcher=patcher)
    assert found == fingerprint(model())


def test_a_weight_that_a_dynamic_host_brought_to_the_device_uncast_counts_as_it_is():
    host = model()
    patcher = on_a_dynamic_host(host, weight=torch.float64, bias=torch.float64)
    inner = host.diffusion_model.inner
    patcher.backup = {"diffusion_model.inner.bias": SimpleNamespace(weight=inner.bias)}
    inner.bias = torch.nn.Parameter(inner.bias.detach().clone())
    weights = module.stored_weights(host.diffusion_model, patcher)
    by_name = {weight.name: weight for weight in weights}
    assert by_name["inner.weight"].dtype == torch.float32
    assert by_name["inner.bias"].dtype == torch.float64
    assert [name for name, weight in by_name.items() if weight.is_left_uncast] == ["inner.bias"]
    like_it = model()
    bias = like_it.diffusion_model.inner.bias.detach().double()
    like_it.diffusion_model.inner.bias = torch.nn.Parameter(bias)
    found = fingerprint(host, patcher=patcher)
    assert found == fingerprint(like_it)
    assert found != fingerprint(model())


def test_an_attention_that_a_checkpoint_prescribes_is_part_of_it():
    """A card that lacks the kernel leaves it out: then two processes compute otherwise."""

    class ComfyAttention(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

    def attention_comfy_kitchen_int8():
        pass

    def of(function):
        made = model()
        block = torch.nn.ModuleDict({"comfy_attention": ComfyAttention(function)})
        made.diffusion_model.double_blocks = torch.nn.ModuleList([block])
        return made

    without, with_one = of(None), of(attention_comfy_kitchen_int8)
    assert not module.agree(fingerprint(without), fingerprint(with_one), only_blocks=True)
    assert module.prescribed_attention(without.diffusion_model) == {}
    name = "double_blocks.0.comfy_attention"
    found = module.prescribed_attention(with_one.diffusion_model)
    assert found == {name: "attention_comfy_kitchen_int8"}
