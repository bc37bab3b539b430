"""Merging: averages and sparse task vectors computed by hand, experts that are the same become one, refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moe import MoEForCausalLM, join, save_byte_tokenizer
from moe.conversion.merging.checkpoints import average, merge_checkpoints, shares_of, sparse_task_vectors
from moe.conversion.merging.experts import clusters, facts_on, merge_experts
from moe.conversion.merging.task_vectors import TaskVectors, breadcrumbs, dare, ties
from moe.conversion.prune_and_join import expert_layers
from routing import RoutingTrace

E, K, L = 6, 2, 3
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "initializer_range": 0.2,
}
TOKENS = torch.randint(0, 96, (2, 15), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["olmoe", "mixtral", "ours with nulls"])
def model(request, tiny_config):
    if request.param == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=E)).eval()
    if request.param == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=E)).eval()
    return MoEForCausalLM(tiny_config(zero_compute_experts=["zero", "copy"])).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def written(tmp_path, count, **changes):
    """Folders of tiny models of one kind with other weights."""
    folders = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = MixtralConfig(**(SIZES | {"vocab_size": 256} | changes), num_local_experts=E)
        folders.append(tmp_path / f"m{seed}")
        MixtralForCausalLM(config).save_pretrained(folders[-1])
        save_byte_tokenizer(folders[-1])
    return folders


TASKS = [torch.tensor([4.0, -3.0, 1.0, 0.5, 0.0]).double(), torch.tensor([-1.0, -2.0, 3.0, 0.2, 0.1]).double()]
EQUAL = [0.5, 0.5]


def test_ties_trims_elects_and_averages_those_that_agree():
    """Of five entries two stay: [4, -3] and [-2, 3] at places 0, 1 and 1, 2; signs +, -, +."""
    how = TaskVectors(sparsify="ties", density=0.4)
    assert ties(TASKS, EQUAL, how, ()).tolist() == [4.0, -2.5, 3.0, 0.0, 0.0]
    everything = TaskVectors(sparsify="ties", density=1.0)
    assert ties(TASKS, EQUAL, everything, ()).tolist() == pytest.approx([4.0, -2.5, 2.0, 0.35, 0.1])
    # with weights .2 and .8 the second model has its way at place 0: .2 * 4 - .8 * 1 = 0 is a tie, .1 and .9 is not
    assert ties(TASKS, [0.1, 0.9], everything, ())[0] == -1.0


def test_ties_of_one_model_without_trimming_is_that_model():
    how = TaskVectors(sparsify="ties", density=1.0)
    assert torch.equal(ties(TASKS[:1], [1.0], how, ()), TASKS[0])


def test_dare_keeps_the_expected_value_and_the_share():
    how = TaskVectors(sparsify="dare", density=0.25)
    task = torch.ones(40_000).double()
    found = dare([task], [1.0], how, [torch.Generator().manual_seed(0)])
    assert set(found.tolist()) == {0.0, 4.0}
    assert abs(float(found.mean()) - 1) < 0.03
    both = dare([task, task], EQUAL, how, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert set(both.tolist()) == {0.0, 2.0, 4.0}


def test_breadcrumbs_leave_the_largest_and_the_smallest_out():
    how = TaskVectors(sparsify="breadcrumbs", density=0.4, outliers=0.2)
    assert breadcrumbs(TASKS[:1], [1.0], how, ()).tolist() == [0.0, -3.0, 1.0, 0.0, 0.0]
    assert breadcrumbs(TASKS, EQUAL, how, ()).tolist() == [-0.5, -2.5, 0.5, 0.0, 0.0]


def test_averages_are_those_of_every_tensor(tmp_path):
    folders = written(tmp_path, 3)
    merge_checkpoints(folders, tmp_path / "out", average(folders, [1, 1, 2]))
    states = [load_file(folder / "model.safetensors") for folder in folders]
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        expected = (states[0][name].double() + states[1][name].double() + 2 * states[2][name].double()) / 4
        assert torch.equal(value, expected.float()), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == E
    merge_checkpoints([folders[0]] * 2, tmp_path / "same", average([folders[0]] * 2))
    assert all(torch.equal(v, states[0][n]) for n, v in load_file(tmp_path / "same/model.safetensors").items())


def test_task_vectors_stand_on_the_base(tmp_path):
    folders = written(tmp_path, 3)
    how = TaskVectors(sparsify="ties", density=0.3, scale=0.7)
    merge_checkpoints(folders, tmp_path / "out", sparse_task_vectors(folders, how, 0))
    states = [load_file(folder / "model.safetensors") for folder in folders]
    name = "model.layers.1.self_attn.q_proj.weight"
    tasks = [states[number][name].double() - states[0][name].double() for number in (1, 2)]
    expected = states[0][name].double() + 0.7 * ties(tasks, EQUAL, how, ())
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], expected.float())
    again = TaskVectors(sparsify="dare", density=0.5)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_checkpoints(folders, tmp_path / out, sparse_task_vectors(folders, again, seed))
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c


def test_misfits_of_checkpoints_are_refused(tmp_path):
    (folder,) = written(tmp_path, 1)
    (tmp_path / "other").mkdir()
    (wider,) = written(tmp_path / "other", 1, intermediate_size=16)
    with pytest.raises(ValueError, match="differ in intermediate_size"):
        merge_checkpoints([folder, wider], tmp_path / "out", average([folder, wider]))
    state = load_file(folder / "model.safetensors")
    less = tmp_path / "less"
    less.mkdir()
    (less / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, less / "model.safetensors")
    with pytest.raises(ValueError, match=r"has the tensor lm_head\.weight"):
        merge_checkpoints([folder, less], tmp_path / "out", average([folder, less]))
    save_file(state | {"lm_head.weight": state["lm_head.weight"][:90].clone()}, less / "model.safetensors")
    with pytest.raises(ValueError, match="has the shapes"):
        merge_checkpoints([folder, less], tmp_path / "out", average([folder, less]))
    assert not (tmp_path / "out").exists()
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="2 positive weights"):
            shares_of(weights, 2)
    for changes, message in (
        ({"density": 0.0}, "density must lie in"),
        ({"sparsify": "tie"}, "ties"),
        ({"sparsify": "breadcrumbs", "density": 0.9, "outliers": 0.2}, "outliers must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskVectors(**changes)


def test_clusters_are_those_of_average_linkage():
    points = np.array([[0.0], [10.0], [0.2], [10.1], [5.0], [0.1]])
    assert clusters(points, 3) == [[0, 2, 5], [1, 3], [4]]
    assert clusters(points, 6) == [[0], [1], [2], [3], [4], [5]]
    assert clusters(np.zeros((4, 2)), 2)[0][0] == 0, "equal points still give as many groups as asked for"
    assert len(clusters(np.zeros((4, 2)), 2)) == 2


@pytest.mark.parametrize("similarity", ["outputs", "weights"])
def test_twins_become_one_and_the_model_computes_what_it_did(model, similarity):
    """A model joined with itself has each expert twice; merged back it is the model again, tensor by tensor."""
    twice = join(model, model)
    facts = facts_on(twice, TOKENS) if similarity == "outputs" else None
    merged = merge_experts(twice, E, similarity=similarity, facts=facts)
    assert merged.groups == [[[e, e + E] for e in range(E)]] * L
    for name, value in merged.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=0, rtol=1e-6)
    torch.testing.assert_close(logits(merged.model), logits(model), atol=1e-5, rtol=1e-4)


def test_keeping_all_changes_nothing_and_fewer_is_loadable(model, tmp_path):
    torch.testing.assert_close(logits(merge_experts(model, E, similarity="weights").model), logits(model))
    merged = merge_experts(model, 3, similarity="outputs", facts=facts_on(model, TOKENS))
    merged.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(merged.model))
    assert all(sorted(e for group in groups for e in group) == list(range(E)) for groups in merged.groups)


def test_members_weigh_as_they_are_used_and_router_rows_too(tiny_config):
    model = MoEForCausalLM(tiny_config(num_experts=3)).eval()
    layer = next(iter(expert_layers(model)))
    state = model.state_dict()
    for name in layer.expert_tensors:  # 0 and 2 are alike, 1 is not
        state[name][2] = state[name][0] + 0.01
        state[name][1] = state[name][0] + 5.0
    count_LE = np.array([[1, 9, 3]] * 3)
    merged = merge_experts(model, 2, similarity="weights", count_LE=count_LE)
    assert merged.groups[0] == [[0, 2], [1]]
    for name in (*layer.expert_tensors, *layer.router_tensors):
        expected = 0.25 * state[name][0].double() + 0.75 * state[name][2].double()
        torch.testing.assert_close(merged.model.state_dict()[name][0], expected.float())
        assert torch.equal(merged.model.state_dict()[name][1], state[name][1])
    unused = merge_experts(model, 2, similarity="weights", count_LE=np.array([[0, 9, 0]] * 3))
    name = layer.expert_tensors[0]
    torch.testing.assert_close(unused.model.state_dict()[name][0], (state[name][0] + state[name][2]) / 2)


def test_facts_count_visits_and_average_outputs_over_all_tokens(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    seen = []
    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    facts = facts_on(model, TOKENS)
    handle.remove()
    x_TD, expert_TK, _ = seen[0]
    assert facts[1].count_E.tolist() == [int((expert_TK == e).sum()) for e in range(E)]
    experts = model.model.layers[1].mlp.experts
    gate_TF, up_TF = (x_TD @ experts.gate_up_proj[4].T).chunk(2, dim=-1)
    expected = ((torch.nn.functional.silu(gate_TF) * up_TF) @ experts.down_proj[4].T).mean(dim=0)
    torch.testing.assert_close(facts[1].output_ED[4].float(), expected, atol=1e-5, rtol=1e-4)


def test_permuted_twins_are_merged_exactly_when_aligned(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    twice = join(model, model)
    generator = torch.Generator().manual_seed(0)
    for layer in twice.model.moe_layers:
        for expert in range(E, 2 * E):
            order = torch.randperm(24, generator=generator)
            gate_FD, up_FD = layer.experts.gate_up_proj.data[expert].chunk(2)
            layer.experts.gate_up_proj.data[expert] = torch.cat([gate_FD[order], up_FD[order]])
            layer.experts.down_proj.data[expert] = layer.experts.down_proj.data[expert][:, order]
    before = {name: value.clone() for name, value in twice.state_dict().items()}
    facts = facts_on(twice, TOKENS)
    aligned = merge_experts(twice, E, similarity="outputs", facts=facts, align=True)
    torch.testing.assert_close(logits(aligned.model), logits(model), atol=1e-5, rtol=1e-4)
    plain = merge_experts(twice, E, similarity="outputs", facts=facts)
    assert float((logits(plain.model) - logits(model)).abs().max()) > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in twice.state_dict().items()), (
        "the source is as it was"
    )


def test_what_cannot_be_merged_is_refused(tiny_config):
    model = MoEForCausalLM(tiny_config())
    with pytest.raises(ValueError, match=r"2\.\.6"):
        merge_experts(model, 1, similarity="weights")
    with pytest.raises(ValueError, match="compared by their outputs"):
        merge_experts(model, 3, similarity="outputs")
    with pytest.raises(ValueError, match="3 layers of 6 experts"):
        merge_experts(model, 3, similarity="weights", count_LE=np.ones((3, 5), int))
    grouped = tiny_config(router="deepseek_v3", router_options={"num_groups": 3, "groups_kept": 2})
    with pytest.raises(ValueError, match="groups"):
        merge_experts(MoEForCausalLM(grouped), 3, similarity="weights")


def test_the_command_by_its_three_methods(tmp_path, run, capsys):
    a, b, c = written(tmp_path, 3)
    assert run("merge", a, b, "--weights", "1,3", "--out", tmp_path / "mean") == 0
    assert run("merge", b, c, "--base", a, "--method", "sparse-task-vectors", "--out", tmp_path / "tasks") == 0
    trace = RoutingTrace(
        expert_TLK=np.tile(np.array([[1, 4]], np.int16), (5, L, 1)),
        sequence_T=np.zeros(5, np.int32),
        metadata={"num_experts": E},
    )
    trace.save(tmp_path / "trace.npz")
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("Some words to compare the experts on. " * 5)
    options = ("--method", "experts", "--keep", 3, "--data", text, "--trace", tmp_path / "trace.npz", "--json", report)
    assert run("merge", a, *options, "--out", tmp_path / "fewer") == 0
    assert len(json.loads(report.read_text())["groups"]) == L
    for name, experts in (("mean", E), ("tasks", E), ("fewer", 3)):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.num_local_experts == experts
        assert AutoTokenizer.from_pretrained(tmp_path / name)("abc")["input_ids"] == [97, 98, 99]
    capsys.readouterr()
    for arguments, message in (
        ((a, "--out", tmp_path / "new"), "two models or more"),
        ((a, b, "--base", c, "--out", tmp_path / "new"), "an average has no base"),
        ((a, b, "--method", "sparse-task-vectors", "--out", tmp_path / "new"), "give it with --base"),
        ((a, b, "--method", "experts", "--keep", 3, "--out", tmp_path / "new"), "join"),
        ((a, "--method", "experts", "--out", tmp_path / "new"), "--keep N"),
        ((a, "--method", "experts", "--keep", 3, "--out", tmp_path / "new"), "--similarity weights"),
        ((a, b, "--method", "mean", "--out", tmp_path / "new"), "average"),
        ((a, b, "--weights", "1;2", "--out", tmp_path / "new"), "commas"),
        ((a, b, "--out", tmp_path / "mean"), "exists already"),
    ):
        assert run("merge", *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_dense_models_are_averaged_too(tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "num_experts_per_tok"}
    for seed in range(2):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / f"d{seed}")
    folders = [tmp_path / "d0", tmp_path / "d1"]
    merge_checkpoints(folders, tmp_path / "out", average(folders))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
