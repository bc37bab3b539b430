"""Experts by units: the resident model's logits from both spellings, slots that a layer's experts share, refusals."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

import offload
from moe import MoEForCausalLM
from offload.neurons.bundle import MAGIC
from tests.quantised_checkpoints import write_tensors
from tests.quantised_formats import fp8_blocks
from tests.served import ask, collect, ids_of, serve

D, F, E, K, L = 48, 40, 6, 2, 2
SIZES = {"vocab_size": 96, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4, "head_dim": 12}
QWEN = Qwen3MoeConfig(
    **SIZES,
    num_key_value_heads=2,
    moe_intermediate_size=F,
    num_experts=E,
    num_experts_per_tok=K,
    hidden_act="relu",
)
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
UNIT_BYTES = 3 * D * 4
"""A row of the gate, a row of up and a column of down, in float32."""


@pytest.fixture(autouse=True)
def one_thread(several_threads):
    several_threads(1)


def _random(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders and resident models: experts one by one in the checkpoint, all in one tensor, and without a gate."""
    from moe import MoEConfig

    transformers.logging.disable_progress_bar()
    sizes = {"vocab_size": 96, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4, "head_dim": 12}
    experts = {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "num_key_value_heads": 2}
    moex = MoEConfig(**sizes, **experts, architecture="moex")
    models = {"single": AutoModelForCausalLM.from_config(QWEN), "moex": MoEForCausalLM(moex)}
    models = {name: _random(model) for name, model in models.items()}
    models["fused"] = models["single"]
    found = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, save_original_format=name != "fused")
        offload.pack_units(folder, folder / "units")
        found[name] = folder, model
    return found


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "cache_units"), [("single", 0), ("single", 70), ("fused", 999), ("moex", 30), ("moex", 999)]
)
def test_logits_and_tokens_are_the_models(saved, name, cache_units):
    folder, resident = saved[name]
    assert ("experts.gate_up_proj" in " ".join(load_file(folder / "model.safetensors"))) == (name == "fused")
    model = offload.load(folder, pack=folder / "units", cache_units=cache_units, arithmetic="exact")
    assert model.num_parameters() == resident.num_parameters()
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(resident), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
        resident.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
    )
    found = model.offload.report()["units"]
    assert found["active"] <= found["chosen"] < found["visited"]
    assert found["units_per_layer"] == [E * F] * L
    if cache_units == 0:
        assert found["read"] == found["chosen"]
    if cache_units == 999:
        assert found["read"] <= E * F * L  # each once at most
    assert model.offload.report()["bytes_read"] == found["bytes_read"]
    model.offload.close()
    with pytest.raises(RuntimeError, match="this model was closed"):
        logits(model)


def test_counts_are_those_of_the_resident_model(saved):
    """Of each visited expert, the units that are not zero for one of its tokens, in as many turns as need be."""
    folder, resident = saved["single"]
    active, visited, hooks = 0, 0, []

    def see(module, given, unit_tF):
        nonlocal active, visited
        active += int((unit_tF > 0).any(dim=0).sum())
        visited += F

    resident.set_experts_implementation("eager")
    for layer in resident.model.layers:
        hooks.append(layer.mlp.experts.act_fn.register_forward_hook(see))
    logits(resident)
    for hook in hooks:
        hook.remove()
    model = offload.load(folder, pack=folder / "units", cache_units=0)
    logits(model)
    found = model.offload.report()["units"]
    assert (found["active"], found["visited"]) == (active, visited)
    assert found["calls"] > L  # a read brings what one token's experts have, and these are more experts
    model.offload.close()


def test_experts_of_a_layer_share_slots_and_only_the_difference_is_read(saved):
    folder, resident = saved["fused"]
    model = offload.load(folder, pack=folder / "units", cache_units=60)
    slots, rng = model.offload.runtime.units.layers[1], np.random.default_rng(0)
    experts = resident.model.layers[1].mlp.experts
    rows_EFW = torch.cat([*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj.transpose(1, 2)], dim=2)
    rows_UW = rows_EFW.detach().flatten(0, 1)
    held = set()
    for _ in range(40):
        unit_n = np.sort(rng.choice(E * F, int(rng.integers(1, K * F)), replace=False))
        before = slots.counters.read
        pieces = np.split(unit_n, [len(unit_n) // 3])
        for piece, found_PW in zip(pieces, slots.gather(pieces), strict=True):
            assert torch.equal(found_PW[: len(piece)], rows_UW[piece])
            assert not found_PW[len(piece) :].any()
        assert slots.counters.read - before == len(set(unit_n.tolist()) - held)
        held = {int(unit) for unit in slots._unit_C if unit >= 0}
    assert len({unit // F for unit in held}) == E
    # a token whose units are all there is computed without a read
    logits(model, IDS[:1, :1])
    read = model.offload.report()["units"]["read"]
    logits(model, IDS[:1, :1])
    assert model.offload.report()["units"]["read"] == read
    model.offload.close()


def test_two_users_have_the_resident_models_answers(saved):
    folder, resident = saved["single"]
    with serve(folder, cache_experts=None, pack=folder / "units", cache_units=60) as engine:
        streams = [engine.submit(ask(prompt, 6, ignore_end=True)) for prompt in IDS.tolist()]
        for prompt, stream in zip(IDS, streams, strict=True):
            expected = resident.generate(prompt[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert ids_of(collect(stream)[0]) == expected[0, len(prompt) :].tolist()


def test_memory_is_divided_among_bounds_slots_and_one_read(saved, run, capsys):
    folder, resident = saved["single"]
    model = offload.load(folder, pack=folder / "units", cache_units=50)
    memory = model.offload.report()["memory"]
    bounds = L * (E * F * D + 3 * 4 * E * F)
    assert memory["window_bytes"] == bounds + K * 64 * UNIT_BYTES + L * 50 * UNIT_BYTES
    assert memory["slot_bytes"] == 0
    inside = sum(p.nbytes for name, p in resident.named_parameters() if ".experts." in name)
    assert inside == L * E * F * UNIT_BYTES
    assert memory["weight_bytes"] <= sum(p.nbytes for p in resident.parameters()) - inside + 4096
    model.offload.close()
    fitted = offload.fit(folder, pack=folder / "units")
    assert fitted.unit_slots == (E * F,) * L
    assert fitted.budgets.all_bytes - fitted.budgets.least_bytes >= inside
    small = offload.fit(folder, pack=folder / "units", cpu_memory=fitted.budgets.all_bytes - inside // 2)
    assert 0 < sum(small.unit_slots) < L * E * F
    assert run("fit", folder, "--pack", folder / "units") == 0
    said = capsys.readouterr().out
    assert f"{L * E * F} hidden units in {L} layers" in said
    assert f"with {L * E * F} of {L * E * F} units in memory" in said
    with pytest.raises(ValueError, match="give at least"):
        offload.load(folder, pack=folder / "units", cpu_memory="100MiB")


def test_a_cut_bundle_and_one_of_another_model_are_refused(saved, tmp_path):
    folder, resident = saved["single"]
    other = tmp_path / "other"
    resident.save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.{E - 1}.down_proj.weight"][0, 0] += 1  # one number of one expert
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of another model, or of another state"):
        offload.load(other, pack=folder / "units")
    cut = tmp_path / "cut"
    whole = (folder / "units").read_bytes()
    cut.write_bytes(whole)
    model = offload.load(folder, pack=cut, cache_units=0)
    header = len(MAGIC) + 8 + int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8], "little")
    with cut.open("r+b") as file:
        file.truncate(header + 10 * UNIT_BYTES)
    with pytest.raises(OSError, match=r"ends within the units of model\.layers\.0\.mlp\.experts"):
        logits(model)
    cut.write_bytes(whole)
    torch.testing.assert_close(logits(model), logits(resident), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="gradients do not pass"):
        model(inputs_embeds=torch.randn(1, 2, D, requires_grad=True), use_cache=False)
    with pytest.raises(ValueError, match="no slots of whole experts"):
        model.offload.prefer_cached(0.1)
    model.offload.close()
    cut.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{len(whole) - 1} bytes; {len(whole)} were expected"):
        offload.load(folder, pack=cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_experts": 2}, "no slot holds a whole one for cache_experts to act on"),
        ({"record_trace": True}, "for record_trace to act on"),
        ({"prefetch": "gate"}, "for prefetch to act on"),
        ({"device": "simulated"}, "for device to act on"),
        ({"adapter": "nowhere"}, "an adapter changes which units are active"),
        ({"resident_layers": 1}, "leave resident_layers or pack out"),
    ],
)
def test_options_of_whole_experts_are_refused(saved, options, message):
    folder, _ = saved["single"]
    with pytest.raises(ValueError, match=message):
        offload.load(folder, pack=folder / "units", **options)


def test_experts_that_are_not_by_units_are_refused(saved, run, tmp_path, capsys):
    def expect_refused(folder, message):
        assert run("pack", folder, "--out", tmp_path / "units", "--bundle") == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "units").exists()

    folder, _ = saved["single"]
    silu = Qwen3MoeConfig(**{**QWEN.to_dict(), "hidden_act": "silu"})
    AutoModelForCausalLM.from_config(silu).save_pretrained(tmp_path / "silu")
    expect_refused(tmp_path / "silu", "its activation (SiLUActivation) is not zero where the gate is negative")
    oss = GptOssConfig(**SIZES, num_key_value_heads=2, intermediate_size=F, num_local_experts=4, layer_types=None)
    AutoModelForCausalLM.from_config(oss).save_pretrained(tmp_path / "oss")
    expect_refused(tmp_path / "oss", "is not computed by units: rows of gate and up alternate in its experts")
    QWEN.save_pretrained(tmp_path / "codes")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        coded = fp8_blocks(tensor, generator)[0] if ".experts." in name else {"weight": tensor}
        tensors |= {name.removesuffix("weight") + part: each for part, each in coded.items()}
    config = {"quant_method": "fp8", "weight_block_size": [40, 40]}
    write_tensors(tmp_path / "codes", tensors, quantization_config=config)
    expect_refused(tmp_path / "codes", "its experts are stored as codes; `expertier dequantise` writes a plain copy")
