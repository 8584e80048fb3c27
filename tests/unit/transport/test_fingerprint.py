"""What a fingerprint sees, and what it does not."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.transport import fingerprint as module
from comfy_xdit_patch.transport.fingerprint import SAMPLE_ELEMENTS
from comfy_xdit_patch.transport.tensors import ForeignTensorError


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


def fingerprint(model):
    return module.fingerprint(model.diffusion_model, manual_cast_dtype=model.manual_cast_dtype)


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


def test_a_single_element_in_the_middle_of_a_tensor_is_not_read():
    """The stated limit: reading 24 GB would cost a second of every run."""
    changed = model()
    changed.diffusion_model.table[SAMPLE_ELEMENTS + 1] = -1
    assert fingerprint(changed) == fingerprint(model())


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
    found = module.fingerprint(host.diffusion_model, manual_cast_dtype=None, patcher=patcher)
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
    found = module.fingerprint(host.diffusion_model, manual_cast_dtype=None, patcher=patcher)
    assert found != fingerprint(model())


def test_what_was_patched_on_a_dynamic_host_counts_as_it_was_stored():
    host = model()
    patcher = on_a_dynamic_host(host, weight=torch.float64)
    inner = host.diffusion_model.inner
    patcher.backup = {"diffusion_model.inner.weight": SimpleNamespace(weight=inner.weight)}
    inner.weight = torch.nn.Parameter(torch.zeros(5, 40))
    found = module.fingerprint(host.diffusion_model, manual_cast_dtype=None, patcher=patcher)
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
    found = module.fingerprint(host.diffusion_model, manual_cast_dtype=None, patcher=patcher)
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
