"""Stored forms: what every member of FORMS owes, and that a third member touches nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.checkpoint.experts import ExpertLayer
from offload.checkpoint.model_folder import skeleton_of
from offload.formats.catalogue import FORMS
from offload.formats.form import BLOCK_BYTES
from offload.formats.packed import PackedForm
from offload.formats.plain import PlainForm
from offload.formats.quantised_forms import QUANTISED_FORMS
from offload.store.packing import read_pack

TOKENS = torch.tensor([[1, 5, 9, 3, 7]])


@dataclass(frozen=True, eq=False)
class InvertedForm(PackedForm):
    """Every byte inverted: the least that a form can be."""

    name: ClassVar[str] = "inverted"
    linears: ClassVar[None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True
    guard_bytes: ClassVar[int] = 0

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, torch.Tensor]:
        start, views = shifts[0], {}
        for parameter in self.layer.parameters:
            views[parameter.name] = slot[start : start + parameter.nbytes]
            start += parameter.nbytes
        return views

    def check(self, expert: int, slot: torch.Tensor) -> None:
        pass

    def expand(self, views: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor]) -> None:
        for name, view in views.items():
            torch.bitwise_not(view, out=room[name].view(-1).view(torch.uint8))

    def token_rate(self, hardware, *, is_fast: bool) -> float:
        return hardware.exact_bytes_per_s

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        return True

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        plain = b"".join(PlainForm.encode(layer, views))
        return [bytes(255 - byte for byte in plain)]

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        return PlainForm.record_bounds(layer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 model whose matrices have whole blocks, so that every form suits them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": 0}
    config = OlmoeConfig(**sizes, **heads, num_experts=6, num_experts_per_tok=2)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(
    params=[*(name for name in FORMS if name not in (*QUANTISED_FORMS, "lowbit", "levels", "ternary")), "inverted"]
)
def form_name(request, monkeypatch):
    monkeypatch.setitem(FORMS, "inverted", InvertedForm)
    return request.param


def test_a_packed_copy_in_any_form_gives_the_bits_of_the_resident_model(form_name, folder, tmp_path):
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    pack = offload.write_pack(folder, tmp_path / "experts", form=form_name)
    for io in ("cached", "direct"):
        model = offload.load(folder, pack=pack, cache_experts=3, io=io)
        assert [slots.form.name for slots in model.offload._runtime.layers] == [form_name] * 2
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, resident(TOKENS).logits)
            assert torch.equal(model(TOKENS[:, :1]).logits, resident(TOKENS[:, :1]).logits)
        model.offload.close()


def test_what_a_form_says_of_its_bytes_fits_together(form_name, folder, tmp_path):
    offload.write_pack(folder, tmp_path / "experts", form=form_name)
    _, entries, layers = skeleton_of(folder)
    forms = [PlainForm(layer) for layer in layers] if form_name == "plain" else []
    for form in [*forms, *read_pack(tmp_path / "experts", layers, entries).forms]:
        assert form.slot_bytes % BLOCK_BYTES == 0
        stored = [form.stored_bytes(expert) for expert in range(form.layer.num_experts)]
        assert form.expert_bytes == -(-sum(stored) // len(stored))
        for expert, nbytes in enumerate(stored):
            extents = form.extents(expert)
            assert sum(extent.nbytes for extent in extents) == nbytes
            assert {extent.entry.file for extent in extents} <= form.files
            assert (extents[0].entry.file, extents[0].offset) == (form.file_of(expert), form.offset_of(expert))
            for extent in extents:
                region = form.regions[extent.region]
                assert region.start <= extent.target
                assert extent.target + extent.nbytes <= region.start + region.nbytes
        slot = torch.zeros(form.slot_bytes + form.guard_bytes, dtype=torch.uint8)
        assert set(form.views(slot, (0,) * len(form.regions))) == {p.name for p in form.layer.parameters}


def test_packing_never_quantises(folder, tmp_path):
    for name in QUANTISED_FORMS:
        with pytest.raises(ValueError, match=rf"stores no experts as {name} \(its experts are plain\)"):
            offload.write_pack(folder, tmp_path / "experts", form=name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match=r"unknown stored form 'compresed' \(did you mean 'compressed'\?\)"):
        offload.write_pack(folder, tmp_path / "experts", form="compresed")
    assert not list(tmp_path.iterdir())
