"""The GPU tier on a simulated device: bits, slots, budgets, faults; and on a real one where there is one."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import offload
import placement
from moe import MoEForCausalLM
from offload.forecast import calibrate_gpu as gpu_calibrate
from offload.gpu import devices as gpu_devices
from offload.gpu import rows as gpu_rows
from placement.contract.homes import Homes
from placement.contract.tier_spec import Tiers
from tests.simulated_lane import SimulatedLane
from tests.test_offload_cache_starting import write_plan

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN = {**SIZES, "intermediate_size": 48, "head_dim": 8}
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN, moe_intermediate_size=21, num_experts=7, num_experts_per_tok=3),
    "gpt_oss": lambda: GptOssConfig(**QWEN, num_local_experts=6, num_experts_per_tok=2, sliding_window=16),
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=1, num_experts_per_tok=1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and resident model of a configuration, made once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "experts" in parameter_name or "router" in parameter_name:
                        parameter.normal_(0, 0.3)
            model.save_pretrained(folder, max_shard_size="100KB")
            resident = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
            made[name, dtype] = (folder, resident.eval())
        return made[name, dtype]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(monkeypatch):
    """`offload.load` on a simulated device; its lane is `model.lane`."""
    models = []

    def load_simulated(folder, *, seed=0, copy_share=0.5, pins=True, kernels=False, **arguments):
        lane = SimulatedLane(seed, copy_share, pins)
        monkeypatch.setattr(gpu_devices, "LANES", {"cuda": lambda: lane})
        monkeypatch.setattr("offload.gpu.plan.budget.RING_SLOTS", 2)
        if not kernels:
            monkeypatch.setattr(
                "offload.gpu.tier.experts_for", lambda module, count, *_: gpu_rows.LoopExperts(module, count)
            )
        model = offload.load(folder, device="cuda", **arguments)
        model.lane = lane
        models.append(model)
        return model

    yield load_simulated
    for model in models:
        model.offload.close()


@pytest.fixture
def all_there(saved, load):
    """What comes out when every expert has its slot."""

    def compute(name, dtype=torch.float32):
        if (name, dtype) not in ALL_THERE:
            ALL_THERE[name, dtype] = run(load(saved(name, dtype)[0], gpu_experts=8, cache_experts=8))
        return ALL_THERE[name, dtype]

    return compute


ALL_THERE = {}
PROMPT = torch.randint(0, 97, (1, 21), generator=torch.Generator().manual_seed(1))


def run(model, prompt=PROMPT, steps=6, device="cpu"):
    """Logits of a prefill and of some decoding steps with given tokens."""
    outputs = []
    with torch.inference_mode():
        output = model(prompt.to(device), use_cache=True)
        outputs.append(output.logits)
        for step in range(steps):
            token = prompt[:, step : step + 1].to(device)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "gpt_oss", "mixtral"])
def test_bits_depend_neither_on_slots_nor_on_when_copies_happen(saved, load, all_there, tolerance, name):
    folder, resident = saved(name)
    torch.testing.assert_close(all_there(name), run(resident), **tolerance[torch.float32])
    for gpu_experts, cache_experts, copy_share in ((1, 1, 0.0), (2, 1, 1.0), (5, 3, 0.5)):
        arguments = {"gpu_experts": gpu_experts, "cache_experts": cache_experts, "policy": "lru"}
        model = load(folder, seed=gpu_experts, copy_share=copy_share, **arguments)
        assert torch.equal(run(model), all_there(name)), arguments
        report = model.offload.report()["gpu"]
        assert report["misses"] > 0
        assert report["copied_bytes"] > 0


def test_kernels_compute_in_the_slots(saved, load, tolerance):
    pytest.importorskip("triton")
    folder, resident = saved("gpt_oss")
    prompt = PROMPT[:, :5]
    expected = run(load(folder, kernels=True, gpu_experts=6, cache_experts=6), prompt, 2)
    torch.testing.assert_close(expected, run(resident, prompt, 2), **tolerance[torch.float32])
    model = load(folder, seed=3, kernels=True, gpu_experts=2, cache_experts=3)
    assert torch.equal(run(model, prompt, 2), expected)
    assert model.offload.report()["gpu"]["computed_by"] == ["kernels"]


@pytest.mark.parametrize("broken", ["compute_after", "after", "lent"])
def test_a_missing_wait_would_be_seen(saved, load, all_there, monkeypatch, broken):
    """The simulated device is sharp: without any one kind of wait, some run gives other bits."""
    folder, _ = saved("olmoe")
    expected = all_there("olmoe")
    if broken == "compute_after":
        monkeypatch.setattr(SimulatedLane, "compute_after", lambda self, copy: None)
    elif broken == "after":
        copy_in = SimulatedLane.copy_in
        monkeypatch.setattr(SimulatedLane, "copy_in", lambda self, pairs, after: copy_in(self, pairs, None))
    else:
        monkeypatch.setattr("offload.gpu.ram_feed.RamFeed.lend", lambda self, expert, copy: self.give_back(expert))
    copy_share = 0.9 if broken == "after" else 0.1
    models = [load(folder, seed=seed, copy_share=copy_share, gpu_experts=1, cache_experts=1) for seed in range(4)]
    assert not all(torch.equal(run(model), expected) for model in models)


def test_what_is_on_the_gpu_costs_nothing_and_ram_keeps_other_experts(saved, load):
    folder, _ = saved("olmoe")
    model = load(folder, gpu_experts=4, cache_experts=4, policy="lru")
    run(model, steps=20)
    tier, runtime = model.offload._runtime.gpu, model.offload._runtime
    for layer, ram in zip(tier._layers, runtime.layers, strict=True):
        on_gpu = set(layer.slots.map.slot_of)
        assert len(on_gpu) == 4
        assert len(on_gpu | set(ram.cache.resident)) > 4
    model.offload.reset()
    run(model, PROMPT[:, :1], 0)
    model.offload.reset()
    run(model, PROMPT[:, :1], 0)
    report = model.offload.report()
    assert (report["gpu"]["hit_rate"], report["gpu"]["copied_bytes"], report["bytes_read"]) == (1.0, 0, 0)


def test_prefill_leaves_the_experts_of_decoding_where_they_are(saved, load):
    folder, _ = saved("olmoe")
    model = load(folder, gpu_experts=3, cache_experts=8)
    run(model)
    tier = model.offload._runtime.gpu
    before = [dict(layer.slots.map.slot_of) for layer in tier._layers]
    assert all(len(slot_of) == 3 for slot_of in before)
    run(model, PROMPT.repeat(2, 3), 0)
    assert [dict(layer.slots.map.slot_of) for layer in tier._layers] == before


def test_the_cpu_takes_a_share_of_the_misses(saved, load, tolerance):
    folder, resident = saved("gpt_oss")
    model = load(folder, gpu_experts=2, cache_experts=6, arithmetic="fast")
    torch.testing.assert_close(run(model, steps=20), run(resident, steps=20), **tolerance[torch.float32])
    report = model.offload.report()["gpu"]
    assert report["cpu_experts"] > 0
    assert report["copied_bytes"] > 0
    exact = load(folder, gpu_experts=2, cache_experts=6)
    run(exact)
    assert exact.offload.report()["gpu"]["cpu_experts"] == 0


def test_half_precision(saved, load, all_there, tolerance):
    folder, resident = saved("olmoe", torch.bfloat16)
    expected = all_there("olmoe", torch.bfloat16)
    torch.testing.assert_close(expected, run(resident), **tolerance[torch.bfloat16])
    for arithmetic in ("exact", "fast"):
        model = load(folder, seed=2, gpu_experts=2, cache_experts=3, arithmetic=arithmetic)
        torch.testing.assert_close(run(model), expected, **tolerance[torch.bfloat16])


def test_generation_batches_traces_and_reading_ahead(saved, load):
    folder, resident = saved("olmoe")
    prompt = torch.tensor([[0, 0, 5, 9], [3, 1, 4, 1]])
    arguments = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = resident.generate(prompt, **arguments)
    for prefetch in ("off", "gate", "transitions"):
        model = load(folder, gpu_experts=2, cache_experts=4, prefetch=prefetch, record_trace=True)
        assert torch.equal(model.generate(prompt, **arguments), expected)
        assert model.offload.trace().num_experts == 8


def test_an_error_while_reading_leaves_the_model_usable(saved, load, all_there, tmp_path):
    original, _ = saved("olmoe")
    folder = shutil.copytree(original, tmp_path / "copy")
    expected = all_there("olmoe")
    model = load(folder, seed=5, gpu_experts=2, cache_experts=3, io="cached")
    run(model, steps=3)
    whole = {shard: shard.read_bytes() for shard in folder.glob("*.safetensors")}
    for shard in whole:
        os.truncate(shard, 4096)
    with pytest.raises(OSError, match=r"expert \d+ of MoE layer \d+ failed"):
        run(model)
    for shard, content in whole.items():
        with shard.open("r+b") as file:
            file.write(content)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("first_failure", [0, 7, 20])
def test_an_error_while_copying_leaves_the_model_usable(saved, load, all_there, first_failure):
    folder, _ = saved("olmoe")
    expected = all_there("olmoe")
    model = load(folder, seed=first_failure, gpu_experts=2, cache_experts=3)
    model.lane.fail_at_copy = first_failure
    with pytest.raises(RuntimeError, match="on fire"):
        run(model)
    assert torch.equal(run(model), expected)


def test_a_step_that_is_interrupted_leaves_the_model_usable(saved, load, all_there, monkeypatch):
    folder, _ = saved("olmoe")
    expected = all_there("olmoe")
    model = load(folder, seed=1, gpu_experts=2, cache_experts=3, policy="lru")
    real, calls = gpu_rows.LoopRows.combine, iter(range(100))

    def interrupted(rows, weight_TK):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(rows, weight_TK)

    monkeypatch.setattr(gpu_rows.LoopRows, "combine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert torch.equal(run(model), expected)


TIERS = [[0, 2, 1, 0, 2, 2, 0, 2], [2, 2, 2, 2, 0, 1, 1, 1]]


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_the_gpu_column_of_a_plan_is_held(saved, load, all_there, tmp_path, name):
    """Experts that the plan puts on the GPU are there before the first token, never leave, and are never missed."""
    folder, _ = saved(name)
    tiers = [row[: 8 if name == "olmoe" else 6] for row in TIERS]
    plan = write_plan(tmp_path / "p.json", tiers)
    model = load(folder, plan=plan, record_trace=True, policy="lru")
    held = [{expert for expert, tier in enumerate(row) if tier == 0} for row in tiers]
    gpu = model.offload._runtime.gpu
    assert [set(layer.slots._slot_of) for layer in gpu._layers] == held
    assert [set(slots.cache.resident) for slots in model.offload._runtime.layers] == [
        {expert for expert, tier in enumerate(row) if tier == 1} for row in tiers
    ]
    assert model.lane.num_copies == sum(map(len, held))
    assert torch.equal(run(model), all_there(name))
    assert all(there <= set(layer.slots._slot_of) for there, layer in zip(held, gpu._layers, strict=True))
    report = model.offload.report()["gpu"]
    assert report["held_per_layer"] == [len(there) for there in held]
    expert_TLK = model.offload.trace().expert_TLK
    calls = [expert_TLK[:21], *expert_TLK[21:, None]]
    visits = sum(len(held[layer] & set(call[:, layer].ravel().tolist())) for call in calls for layer in range(2))
    assert report["hits"] >= visits
    wrong = {"gpu_experts": 3}
    with pytest.raises(ValueError, match="plan and gpu_experts both say"):
        load(folder, plan=plan, **wrong)


def test_a_plan_of_several_nodes_gives_each_its_part(saved, load, all_there, tmp_path):
    """Three nodes: one with a GPU of its own experts, one with host memory, one with nothing; all run the model."""
    folder, _ = saved("olmoe")
    map_LP = np.array([[3, 5, 0, -1, -1, -1], [1, -1, 7, 6, -1, -1]])
    host_LEM, ssd_LEM = np.zeros((2, 2, 8, 3), np.int8)
    host_LEM[:, 2, 1] = host_LEM[0, 4, 1] = 1
    ssd_LEM[:, :, 2] = 1
    for layer, row in enumerate(map_LP.tolist()):
        ssd_LEM[layer, [e for e in row if e >= 0], 2] = 0
    ssd_LEM[:, :, 2] *= 1 - host_LEM[:, :, 1]
    plan = placement.Plan(
        physical_to_logical_LP=map_LP,
        num_experts=8,
        cluster=placement.Cluster.grid(3, 1),
        layer_ids=(0, 1),
        hidden_layers=2,
        homes=Homes(host_LEM=host_LEM, ssd_LEM=ssd_LEM),
    )
    plan.save(tmp_path / "p.json")
    on_gpu, in_ram = [[{3, 5}, {1}], [{0}, {7, 6}], [set(), set()]], [set(), {4, 2}, set()]
    for node in range(3):
        model = load(folder, plan=tmp_path / "p.json", node=node)
        layers = model.offload._runtime.gpu._layers
        assert [set(layer.slots.held) for layer in layers] == on_gpu[node]
        assert set(model.offload._runtime.layers[0].cache.resident) == in_ram[node]
        assert torch.equal(run(model), all_there("olmoe"))
    with pytest.raises(ValueError, match="it is of 3 nodes; say which one this machine is: node 0 to 2"):
        load(folder, plan=tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"node 3 is outside 0\.\.2"):
        load(folder, plan=tmp_path / "p.json", node=3)
    with pytest.raises(ValueError, match="give such a plan"):
        load(folder, node=1)


def test_held_experts_come_back_after_an_error(saved, load, all_there, tmp_path):
    folder, _ = saved("olmoe")
    model = load(folder, seed=2, plan=write_plan(tmp_path / "p.json", TIERS), policy="lru")
    model.lane.fail_at_copy = model.lane.num_copies + 3
    with pytest.raises(RuntimeError, match="on fire"):
        run(model)
    assert torch.equal(run(model), all_there("olmoe"))
    for layer, row in zip(model.offload._runtime.gpu._layers, TIERS, strict=True):
        visited = {expert for expert, tier in enumerate(row) if tier == 0} & set(layer.slots._slot_of)
        assert visited
        assert len(layer.slots._slot_of) == layer.slots.num_slots


def test_a_plan_that_does_not_fit_the_gpu_says_so(saved, load, tmp_path, monkeypatch):
    monkeypatch.setattr(SimulatedLane, "available_bytes", lambda lane: 750 << 20)
    folder, _ = saved("olmoe")
    plan = write_plan(tmp_path / "p.json", [[0] * 8] * 2)
    with pytest.raises(ValueError, match=r"in GPU memory and .* bytes are left for them; solve it again"):
        load(folder, plan=plan)


def test_memory_that_cannot_be_pinned_is_used_all_the_same(saved, load, all_there):
    folder, _ = saved("olmoe")
    expected = all_there("olmoe")
    pinned, pageable = (load(folder, gpu_experts=2, cache_experts=3, pins=pins) for pins in (True, False))
    assert torch.equal(run(pageable), expected)
    assert not pageable.offload.report()["gpu"]["is_pinned"]
    assert len(pinned.lane.pinned) == 2
    pinned.offload.close()
    assert pinned.lane.pinned == []


def test_gpu_budgets(saved, load):
    folder, _ = saved("olmoe")
    model = load(folder, gpu_memory="900MiB", cache_experts=3)
    plan = model.offload._runtime.gpu.plan
    assert plan.num_slots == (8, 8)
    assert plan.fixed_bytes + plan.slot_bytes <= 900 << 20
    assert plan.weight_bytes == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert (model.lane.limited_to, model.offload.plan.weight_bytes) == (900 << 20, 0)
    assert model.lane.pool_bytes <= plan.slot_bytes + plan.staging_bytes
    assert load(folder, cache_experts=3).offload._runtime.gpu.plan.limit_bytes == int(0.9 * (2 << 30))
    with pytest.raises(ValueError, match=r"gpu_memory: 100.00 MiB is too small.*give at least"):
        load(folder, gpu_memory="100MiB", cache_experts=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"device": "cpu", "gpu_memory": "1GiB"}, "no GPU slots"),
        ({"device": "cuda", "gpu_memory": 0}, "nothing fits"),
        ({"device": "cuda", "gpu_experts": 0}, "gpu_experts must be at least 1"),
        ({"device": "cuda", "gpu_memory": "much"}, "as a size"),
    ],
)
def test_contradictions_are_refused(saved, monkeypatch, arguments, message):
    monkeypatch.setattr(gpu_devices, "LANES", {"cuda": SimulatedLane})
    with pytest.raises(ValueError, match=message):
        offload.load(saved("olmoe")[0], cache_experts=2, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(saved):
    with pytest.raises(ValueError, match="finds no CUDA device"):
        offload.load(saved("olmoe")[0], device="cuda")


def test_rates_of_a_device():
    lane = SimulatedLane()
    assert gpu_calibrate.wire_bandwidth(lane, 1 << 16) == pytest.approx(1e9)
    assert gpu_calibrate.read_bandwidth(lane, 1 << 16) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_on_a_gpu(saved, tolerance, name, dtype):
    """The same bits at every number of slots, and close to transformers on the same GPU."""
    folder, resident = saved(name, dtype)
    arguments = {"device": "cuda", "cache_experts": 3}
    outputs = []
    for gpu_experts in (8, 4, 1):
        model = offload.load(folder, gpu_experts=gpu_experts, **arguments)
        outputs.append(run(model, device="cuda").cpu())
        assert model.offload.report()["gpu"]["computed_by"] == ["kernels"]
        model.offload.close()
    expected = run(resident.cuda(), device="cuda").cpu()
    resident.cpu()
    torch.testing.assert_close(outputs[0], expected, **tolerance[dtype])
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])
    model = offload.load(folder, gpu_experts=2, arithmetic="fast", **arguments)
    torch.testing.assert_close(run(model, device="cuda").cpu(), expected, **tolerance[dtype])
    model.offload.close()


@pytest.mark.parametrize(("ahead", "gpu_experts"), [(1, 2), (2, 4), (3, 3)])
def test_experts_that_are_decided_ahead_are_copied_ahead(load, tiny_config, tmp_path, ahead, gpu_experts):
    """Of each decoded token only the first layers, whose gates are their own, ask for what is not on the GPU."""
    config = tiny_config(router="pregate", router_options={"ahead": ahead}, num_hidden_layers=5)
    torch.manual_seed(4)
    MoEForCausalLM(config).save_pretrained(tmp_path)
    prompt, settings = torch.randint(96, (1, 5)), {"max_new_tokens": 6, "do_sample": False}
    expected = load(tmp_path, gpu_experts=6, cache_experts=6).generate(prompt, **settings)
    planned = {"gpu_experts": gpu_experts, "cache_experts": 6, "prefetch": "plan"}
    for seed, copy_share in ((1, 0.0), (2, 0.7)):
        model = load(tmp_path, seed=seed, copy_share=copy_share, **planned)
        assert torch.equal(model.generate(prompt, **settings), expected)
        model.offload.runtime.ahead.fill([range(6)] * 5)  # what the disk has to read first may come late
        model.offload.reset()
        with torch.no_grad():
            for token in range(4):
                model(torch.tensor([[token]]), use_cache=False)
        found = model.offload.report()["gpu"]
        assert found["copied_ahead"] > 0
        assert found["misses"] <= 4 * ahead * config.num_experts_per_tok
        few = load(tmp_path, seed=seed, copy_share=copy_share, **planned | {"cache_experts": 3})
        assert torch.equal(few.generate(prompt, **settings), expected)  # what the disk still reads comes late


def test_a_missing_wait_for_a_copy_ahead_would_be_seen(load, tiny_config, tmp_path, monkeypatch):
    MoEForCausalLM(tiny_config(router="pregate", num_hidden_layers=4)).save_pretrained(tmp_path)
    token = torch.tensor([[7]])
    with torch.no_grad():
        expected = load(tmp_path, gpu_experts=6, cache_experts=6)(token).logits
        model = load(tmp_path, gpu_experts=2, cache_experts=6, prefetch="plan", copy_share=0.0)
        monkeypatch.setattr(model.lane, "compute_after", lambda copy: None)
        assert not torch.equal(model(token).logits, expected)


@pytest.mark.parametrize(("peer_experts", "seed"), [(1, 1), (3, 2), (8, 3)])
def test_what_the_gpu_gives_up_comes_back_from_its_peer(saved, load, all_there, peer_experts, seed):
    """With a slot for every expert on the other GPU, each comes from RAM until it is first given up."""
    folder, _ = saved("olmoe")
    size = 3 * 32 * 24 * 4
    model = load(folder, seed=seed, gpu_experts=2, cache_experts=2, peer_memory=2 * peer_experts * size)
    assert model.lane.peer_bytes == 2 * peer_experts * size
    for found, expected in zip(run(model), all_there("olmoe"), strict=True):
        assert torch.equal(found, expected)
    report = model.offload.report()
    assert report["gpu"]["peer_slots_per_layer"] == [peer_experts] * 2
    alone = load(folder, seed=seed, gpu_experts=2, cache_experts=2)
    run(alone)
    assert report["gpu"]["peer_hits"] > 0
    assert report["bytes_read"] < alone.offload.report()["bytes_read"]
    if peer_experts == 8:
        model.offload.reset()
        with torch.inference_mode():
            for token in range(20):
                model(torch.tensor([[token]]), use_cache=False)
        steady = model.offload.report()
        assert steady["gpu"]["peer_hits"] >= steady["gpu"]["misses"] - 2 * 8
        assert steady["misses"] <= 2 * 8
    model.offload.close()


def test_a_plan_with_peers_is_carried_out(saved, load, all_there, tmp_path):
    """Of two GPUs one computes: what the plan puts on the other is there before the first token, and stays there."""
    folder, _ = saved("olmoe")
    map_LP = np.array([[3, 5, 0, 7], [1, -1, 6, 2]])
    ssd_LEM = np.ones((2, 8, 1), np.int8)
    for layer, row in enumerate(map_LP.tolist()):
        ssd_LEM[layer, [e for e in row if e >= 0]] = 0
    cluster = replace(placement.Cluster.grid(1, 2), tiers=Tiers(peers="nvlink"))
    plan = placement.Plan(
        physical_to_logical_LP=map_LP,
        num_experts=8,
        cluster=cluster,
        layer_ids=(0, 1),
        hidden_layers=2,
        tier_LE=2 * ssd_LEM[:, :, 0].astype(np.int64),
        homes=Homes(host_LEM=np.zeros_like(ssd_LEM), ssd_LEM=ssd_LEM),
    )
    plan.save(tmp_path / "p.json")
    for given in ({}, {"node": 0}, {"peer_memory": 6 * 3 * 32 * 24 * 4}):
        model = load(folder, plan=tmp_path / "p.json", **given)
        layers = model.offload._runtime.gpu._layers
        assert [set(layer.slots.held) for layer in layers] == [{3, 5}, {1}]
        assert [set(layer.peer._slot_of) for layer in layers] == [{0, 7}, {6, 2}]
        assert torch.equal(run(model), all_there("olmoe"))
        assert all(there <= set(layer.peer._slot_of) for there, layer in zip(({0, 7}, {6, 2}), layers, strict=True))
        report = model.offload.report()["gpu"]
        assert report["held_at_peers_per_layer"] == [2, 2]
        assert report["peer_slots_per_layer"] == [3 if "peer_memory" in given else 2] * 2
        assert report["peer_hits"] > 0
    with pytest.raises(ValueError, match="of experts in peer memory, and peer_memory="):
        load(folder, plan=tmp_path / "p.json", peer_memory=3 * 3 * 32 * 24 * 4)


def test_peer_memory_that_cannot_be_is_refused(saved, load):
    folder, _ = saved("olmoe")
    with pytest.raises(ValueError, match="is a tier below a GPU"):
        offload.load(folder, peer_memory="1MiB")
    with pytest.raises(ValueError, match="peer_memory=100 holds no expert"):
        load(folder, gpu_experts=2, cache_experts=2, peer_memory=100)
