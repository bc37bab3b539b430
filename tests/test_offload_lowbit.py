"""Low-bit packed copies of a small model: written, resumed, loaded, opened by others, fitted to a budget."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, OlmoeConfig
from xxhash import xxh3_64_hexdigest

import offload
from offload.lowbit import writing
from offload.lowbit.choosing import choose
from offload.lowbit.inputs import RecordedInputs
from offload.lowbit.journal import Journal
from offload.lowbit.measuring import Option, Unit
from offload.lowbit.open_folder import write_open_folder
from offload.lowbit.quantise import Source
from offload.lowbit.reading import ExpertReader
from offload.runtime.depths import depths_in
from offload.runtime.opening import open_headers
from tests.quantised_checkpoints import logits_of, write_olmoe, write_plain

TOKENS = torch.arange(24)[None] * 7 % 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder, and next to it a text."""
    folder = write_olmoe(tmp_path_factory.mktemp("lowbit") / "model")
    words = ("expert", "router", "token", "layer", "memory", "slot")
    text = " ".join(words[(i * i + i // 7) % 6] for i in range(400))
    (folder.parent / "book.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def inputs(model):
    place = model.parent / "inputs"
    return offload.calibrate(model, model.parent / "book.txt", place, tokens=512, length=64, needs_sensitivity=True)


def resident_twin(model, pack):
    """The model whose experts are those of a packed copy, decoded one by one."""
    opened = open_headers(model, pack)
    twin = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    reader = ExpertReader(opened.model, opened.forms)
    for layer, form in enumerate(opened.forms):
        for expert, parameter in itertools.product(range(form.layer.num_experts), form.layer.parameters):
            weight_EOC = twin.get_submodule(form.layer.module_name).get_parameter(parameter.name)
            weight_EOC.data[expert] = reader.matrices(layer, expert)[parameter.name].bfloat16()
    reader.close()
    return twin


@pytest.mark.parametrize("form", ["int8", "int4", "int3", "int2", "mxfp4", "fp8"])
def test_a_packed_copy_computes_like_its_decoded_twin_and_opens_elsewhere(model, tmp_path, form):
    pack, folder = tmp_path / "experts", tmp_path / "open"
    assert offload.quantise(model, pack, form=form, method="rtn") == {"rtn": 8}
    offloaded = logits_of(offload.load(model, pack=pack, cache_experts=3), TOKENS)
    assert torch.equal(offloaded, logits_of(resident_twin(model, pack), TOKENS))
    write_open_folder(model, pack, folder)
    assert torch.equal(offloaded, logits_of(offload.load(folder, cache_experts=4), TOKENS))


def test_transformers_loads_the_open_folder_to_the_same_bits(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    pack, folder = tmp_path / "experts", tmp_path / "open"
    offload.quantise(model, pack, form="int3", method="rtn")
    write_open_folder(model, pack, folder, shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert torch.equal(logits_of(theirs, TOKENS), logits_of(resident_twin(model, pack), TOKENS))


def test_zeros_have_no_open_folder(model, tmp_path):
    offload.quantise(model, tmp_path / "experts", form="int4", method="hqq")
    with pytest.raises(ValueError, match="leaves out without a word"):
        write_open_folder(model, tmp_path / "experts", tmp_path / "open")
    assert not list(tmp_path.glob("open*"))


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_methods_with_inputs_err_less_on_them_and_fall_back_where_there_are_few(model, inputs, tmp_path, method):
    methods = offload.quantise(model, tmp_path / method, form="int3", method=method, inputs=inputs)
    assert methods == {method: 8}
    offload.quantise(model, tmp_path / "rtn", form="int3", method="rtn")
    judge = offload.Judge(
        offload.Contestant(path_or_id=model, cache_experts=4),
        model.parent / "book.txt",
        tmp_path,
        tokens=256,
        length=64,
    )
    errors = []
    for name in (method, "rtn"):
        found = judge.judge(offload.Contestant(path_or_id=model, pack=tmp_path / name, cache_experts=4))
        errors.append(sum(layer.error for layer in found.layers))
    assert errors[0] < (0.6 if method == "gptq" else 1.0) * errors[1]

    class Few(RecordedInputs):
        def rows(self, layer, expert, most=4096):
            found = super().rows(layer, expert, most)
            return found if expert else type(found)(found.x_NC[:3], found.weight_N[:3], 3)

    few = Few(model.parent / "inputs")
    assert offload.quantise(model, tmp_path / "few", form="int3", method=method, inputs=few) == {method: 6, "rtn": 2}
    assert json.loads((tmp_path / "few.json").read_text())["recipe"]["methods"] == {method: 6, "rtn": 2}


def test_recorded_inputs_are_those_of_the_resident_model(model, inputs):
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    seen = []
    resident.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _module, given: seen.append(given))
    text = (model.parent / "book.txt").read_bytes()[:512]
    for begin in range(0, 512, 64):
        logits_of(resident, torch.tensor([list(text[begin : begin + 64])]))
    x_TD, expert_TK, weight_TK = (torch.cat([given[place] for given in seen]) for place in range(3))
    found = inputs.rows(1, 2)
    token_N, place_N = (expert_TK == 2).nonzero(as_tuple=True)
    assert found.num_seen == len(token_N)
    assert torch.equal(found.x_NC, x_TD[token_N].float())
    assert torch.equal(found.weight_N, weight_TK[token_N, place_N].float())
    assert len(inputs.rows(1, 2, most=5).x_NC) == 5
    assert all(each > 0 for each in inputs.about["sensitivity"])


def test_a_run_that_stopped_goes_on(model, tmp_path, monkeypatch):
    offload.quantise(model, tmp_path / "whole", form="int4", method="rtn")
    written, real = [], writing._record

    def interrupted(*given):
        written.append(given[2:])
        if len(written) == 6:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(writing, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload.quantise(model, tmp_path / "part", form="int4", method="rtn")
    assert not (tmp_path / "part").exists()
    with (tmp_path / "part.part").open("ab") as file:
        file.write(b"torn")
    with (tmp_path / "part.part.lowbit").open("a") as file:
        file.write('{"offset": 4096, "nby')
    written.clear()
    monkeypatch.setattr(writing, "_record", lambda *given: written.append(given[2:]) or real(*given))
    offload.quantise(model, tmp_path / "part", form="int4", method="rtn")
    assert written == [(1, 1), (1, 2), (1, 3)]
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "part.json").read_text() == (tmp_path / "whole.json").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "whole.json", "part", "part.json"}


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 2}
    write_plain(OlmoeConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0), tmp_path / "model")
    offload.quantise(tmp_path / "model", tmp_path / "whole", form="int4", method="hqq")
    command = [sys.executable, "-m", "experiments.cli", "pack", str(tmp_path / "model"), "--form", "int4"]
    command += ["--out", str(tmp_path / "x")]
    running = subprocess.Popen(command, env=os.environ)
    state = tmp_path / "x.part.lowbit"
    while running.poll() is None and not (state.exists() and len(state.read_text().splitlines()) > 2):
        time.sleep(0.01)
    assert running.poll() is None, "it ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "x").exists()
    subprocess.run(command, check=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_journal_keeps_whole_lines_of_the_same_run(tmp_path):
    file = tmp_path / "journal"
    secured, journal = [], None
    journal = Journal(file, {"run": 1}, lambda: secured.append(file.read_text()))
    journal.append({"a": 1}, {"a": 2})
    journal.save()
    assert len(secured) == 1
    assert '"a"' not in secured[0], "what lines name is on disk before them"
    file.write_text(file.read_text() + '{"a": 3')
    assert Journal(file, {"run": 1}).done == [{"a": 1}, {"a": 2}]
    again = Journal(file, {"run": 1})
    again.keep(1)
    assert Journal(file, {"run": 1}).done == [{"a": 1}]
    assert Journal(file, {"run": 2}).done == []


def test_what_is_quantised_is_not_quantised_again(model, tmp_path):
    offload.quantise(model, tmp_path / "experts", form="int8", method="rtn")
    folder = write_open_folder(model, tmp_path / "experts", tmp_path / "open")
    with pytest.raises(ValueError, match=r"stored as int8 already; they are not quantised a second time"):
        offload.quantise(folder, tmp_path / "again", form="int4", method="rtn")


@pytest.mark.parametrize("damage", ["head", "schemes", "bytes"])
def test_damaged_copies_are_refused(model, tmp_path, damage):
    pack, index_file = tmp_path / "experts", tmp_path / "experts.json"
    offload.quantise(model, pack, form="int3", method="rtn")
    index = json.loads(index_file.read_text())
    if damage == "schemes":
        index["layers"][0]["schemes"][1] = ["int4-32", "int4-32"]
    elif damage == "bytes":
        index["layers"][0]["schemes"].pop()
    else:
        from xxhash import xxh3_64_hexdigest

        record = index["layers"][1]["records"][0]
        data = bytearray(pack.read_bytes())
        data[record["offset"] + 8] = 200
        pack.write_bytes(data)
        whole = bytes(data[record["offset"] : record["offset"] + record["nbytes"]])
        record["xxh3"] = xxh3_64_hexdigest(whole)
    index_file.write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match="make it again"):
        logits_of(offload.load(model, pack=pack, cache_experts=4), TOKENS)


def test_bits_of_every_matrix_under_a_budget(model, inputs, tmp_path):
    """Mixed layers compute like their twin; with all experts in memory each has a slot of its own size."""
    choice = offload.quantise_to_bits(model, tmp_path / "experts", 4.2, method="rtn", inputs=inputs)
    forms = open_headers(model, tmp_path / "experts").forms
    assert len({names for form in forms for names in form.schemes_E}) > 1
    assert sum(sum(map(len, form.schemes_E)) for form in forms) == len(choice.options) == 16
    assert choice.nbytes <= 4.2 * 8 * 96 * 64 * 3 / 8
    twin = logits_of(resident_twin(model, tmp_path / "experts"), TOKENS)
    for slots in (2, 4):
        loaded = offload.load(model, pack=tmp_path / "experts", cache_experts=slots)
        assert torch.equal(logits_of(loaded, TOKENS), twin)
    assert loaded.offload.plan.slot_bytes == sum(sum(form.own_slot_bytes) for form in forms)


def units_of(sizes, costs):
    return [
        Unit(0, number, "w", tuple(Option(str(place), *pair) for place, pair in enumerate(zip(*rows, strict=True))))
        for number, rows in enumerate(zip(sizes, costs, strict=True))
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (5, 3), generator=generator).tolist()
    costs = torch.rand(5, 3, generator=generator).tolist()
    budget = 60
    every = [
        sum(row[pick] for row, pick in zip(costs, picks, strict=True))
        for picks in itertools.product(range(3), repeat=5)
        if sum(row[pick] for row, pick in zip(sizes, picks, strict=True)) <= budget
    ]
    if not every:
        with pytest.raises(ValueError, match="larger --fit"):
            choose(units_of(sizes, costs), budget)
        return
    found = choose(units_of(sizes, costs), budget)
    assert found.cost == pytest.approx(min(every), rel=1e-3)
    assert found.nbytes <= budget
    assert found.bound <= found.cost + 1e-9


@pytest.mark.parametrize("form", ["planes", "residual"])
def test_levels_are_read_as_deep_as_asked_and_compute_like_their_twin(model, tmp_path, form):
    offload.quantise_in_levels(model, tmp_path / "experts", form=form)
    read = []
    for depth in (1, 3):
        loaded = offload.load(model, pack=tmp_path / "experts", cache_experts=3, depth=depth)
        logits = logits_of(loaded, TOKENS)
        packed = open_headers(model, tmp_path / "experts").packed
        reader = ExpertReader(loaded, packed.to_depth([[depth] * 4] * 2).forms)
        twin = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        for layer, expert in itertools.product(range(2), range(4)):
            form = reader.form(layer)
            levels = next(iter(reader.views(layer, expert).values()))[:depth]
            for name, w_OC in form.matrices(levels).items():
                twin.model.layers[layer].mlp.experts.get_parameter(name).data[expert] = w_OC.bfloat16()
        reader.close()
        assert torch.equal(logits, logits_of(twin, TOKENS))
        assert torch.equal(logits_of(loaded, TOKENS[:, :1]), logits_of(twin, TOKENS[:, :1]))
        report = loaded.offload.report()
        assert report["depth_L"] == [depth, depth]
        read.append(report["bytes_read"])
    assert read[0] < 0.7 * read[1]
    with pytest.raises(ValueError, match="depth must lie between 1 and"):
        offload.load(model, pack=tmp_path / "experts", depth=99)
    with pytest.raises(ValueError, match="is for packed copies in levels"):
        offload.load(model, depth=1)


def test_memory_decides_depths_and_never_exceeds_the_budget(model, tmp_path):
    offload.quantise_in_levels(model, tmp_path / "experts", form="residual")
    packed = open_headers(model, tmp_path / "experts").packed
    whole = sum(sum(form.own_slot_bytes) for form in packed.forms)
    before = None
    for budget in range(0, whole + 8192, 8192):
        depth_LE = depths_in(packed, budget)
        forms = packed.to_depth(depth_LE).forms
        taken = sum(sum(form.own_slot_bytes) for form in forms)
        assert taken <= budget or depth_LE == [[1] * 4] * 2
        assert before is None or sum(map(sum, depth_LE)) >= before
        before = sum(map(sum, depth_LE))
    assert depth_LE == [[8] * 4] * 2


def test_ternary_experts_compute_like_their_twin_and_err_less_with_inputs(model, inputs, tmp_path):
    errors, source = [], Source.opened(model)
    plain = ExpertReader(source.model, source.forms)
    for name, given, method in (("rtn", None, "rtn"), ("gptq", inputs, "gptq")):
        pack = tmp_path / name
        assert offload.quantise_to_ternary(model, pack, inputs=given) == {method: 8}
        opened = open_headers(model, pack)
        low = ExpertReader(opened.model, opened.forms, opened.checksums)
        x_NC = inputs.rows(0, 1).x_NC
        left_OC = low.matrices(0, 1)["gate_up_proj"] - plain.matrices(0, 1)["gate_up_proj"]
        errors.append(float((x_NC @ left_OC.T).square().sum()))
        low.close()
        offloaded = logits_of(offload.load(model, pack=pack, cache_experts=2), TOKENS)
        assert torch.equal(offloaded, logits_of(resident_twin(model, pack), TOKENS))
    plain.close()
    assert errors[1] < errors[0]
    data = bytearray((tmp_path / "rtn").read_bytes())
    index = json.loads((tmp_path / "rtn.json").read_text())
    record = index["layers"][0]["records"][2]
    assert len({each["nbytes"] for layer in index["layers"] for each in layer["records"]}) > 1
    data[record["offset"] + 9] ^= 1
    end = record["offset"] + record["nbytes"]
    record["xxh3"] = xxh3_64_hexdigest(bytes(data[record["offset"] : end]))
    (tmp_path / "rtn").write_bytes(bytes(data))
    (tmp_path / "rtn.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="not stored as its record says"):
        logits_of(offload.load(model, pack=tmp_path / "rtn", cache_experts=4), TOKENS)


def test_a_transposed_model_with_biases_and_interleaved_gates(tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    write_plain(GptOssConfig(**sizes, **heads, layer_types=["full_attention"]), tmp_path / "model")
    (tmp_path / "book.txt").write_text("experts of transposed models " * 20)
    inputs = offload.calibrate(tmp_path / "model", tmp_path / "book.txt", tmp_path / "inputs", tokens=256, length=64)
    offload.quantise(tmp_path / "model", tmp_path / "experts", form="int4", method="gptq", inputs=inputs)
    source = Source.opened(tmp_path / "model")
    plain, low = (
        ExpertReader(source.model, open_headers(tmp_path / "model", pack).forms)
        for pack in (None, tmp_path / "experts")
    )
    for name, w_OC in plain.matrices(0, 1).items():
        got_OC = low.matrices(0, 1)[name]
        assert got_OC.shape == w_OC.shape == {"gate_up_proj": (64, 64), "down_proj": (64, 32)}[name]
        assert float((got_OC - w_OC).norm() / w_OC.norm()) < 0.2
    plain.close()
    low.close()
    offloaded = offload.load(tmp_path / "model", pack=tmp_path / "experts", cache_experts=2)
    assert torch.isfinite(logits_of(offloaded, TOKENS)).all()
    offload.quantise_to_ternary(tmp_path / "model", tmp_path / "ternary", inputs=inputs)
    offloaded = offload.load(tmp_path / "model", pack=tmp_path / "ternary", cache_experts=2)
    assert torch.equal(logits_of(offloaded, TOKENS), logits_of(resident_twin_of_transposed(tmp_path), TOKENS))


def resident_twin_of_transposed(tmp_path):
    opened = open_headers(tmp_path / "model", tmp_path / "ternary")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    reader = ExpertReader(opened.model, opened.forms)
    for expert in range(4):
        for name, w_OC in reader.matrices(0, expert).items():
            twin.model.layers[0].mlp.experts.get_parameter(name).data[expert] = w_OC.t().bfloat16()
    reader.close()
    return twin
