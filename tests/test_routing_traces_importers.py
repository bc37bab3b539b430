"""Every importer against recordings written by the engine's own rules; what is wrong is refused with its reason."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from experiments import cli
from routing import RoutingTrace
from routing.ground.files import write_json
from routing.traces import IMPORTERS, import_trace
from routing.traces.importers.reading.opening import binary_kind
from routing.traces.importers.sglang_requests import RequestFinder

E = 12
property_test = settings(max_examples=25, deadline=None)


@st.composite
def recordings(draw, least_k=1):
    """Requests `[tokens, layers, K]` of distinct experts, and the decoder layers."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))
    K = draw(st.integers(least_k, 3))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    requests = [np.argsort(random.random((length, len(layers), E)), axis=2)[:, :, :K] for length in lengths]
    return requests, layers, random


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A new folder for each example of a property test."""
    return lambda: tmp_path_factory.mktemp("recording")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def expect_requests(trace, requests, layers, *, in_order=True):
    """The trace has exactly these requests, at these layers, each from position 0."""
    if layers is not None:
        assert trace.layer_ids == tuple(layers)
    ids = np.unique(trace.sequence_T)
    got = []
    for request in ids:
        rows = trace.sequence_T == request
        assert trace.position_T[rows].tolist() == list(range(rows.sum()))
        got.append(trace.expert_TLK[rows].tolist())
    assert len(ids) == 1 or (np.diff(trace.sequence_T) >= 0).all()
    wanted = [request.tolist() for request in requests]
    assert (got == wanted) if in_order else (sorted(got) == sorted(wanted))


# --- vLLM -------------------------------------------------------------------------------------------------------------


def npy_text(array):
    file = io.BytesIO()
    np.save(file, array.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def bare(array):
    data = base64.b64encode(array.astype(np.int16).tobytes()).decode()
    return {"encoding": "base64", "dtype": "int16", "shape": list(array.shape), "data": data}


@property_test
@given(recorded=recordings(least_k=2), form=st.sampled_from(["lists", "npy", "bare"]), with_usage=st.booleans())
def test_vllm_responses_of_every_form(folder, recorded, form, with_usage):
    requests, _, random = recorded
    responses = []
    for request in requests:
        prompt = int(random.integers(1, len(request) + 1))
        usage = {"prompt_tokens": prompt, "completion_tokens": len(request) - prompt + 1}
        response = {"id": "a", "usage": usage if with_usage else None, "choices": [{"index": 0}]}
        if form == "lists":
            response["prompt_routed_experts"] = request[:prompt].tolist()
            response["choices"][0]["routed_experts"] = request[prompt:].tolist()
        else:
            response["choices"][0]["routed_experts"] = (npy_text if form == "npy" else bare)(request)
        responses.append(response)
    path = folder() / "r.jsonl"
    write_lines(path, responses)
    expect_requests(import_trace(path), requests, None)


def test_vllm_choices_share_their_prompt_and_dense_layers_are_left_out(tmp_path):
    prompt, one, two = [[[0, 0], [2, 3]], [[0, 0], [1, 2]]], [[[0, 0], [3, 1]]], [[[0, 0], [0, 1]]]
    usage = {"prompt_tokens": 2, "completion_tokens": 4}
    for shared in (True, False):
        choices = [{"routed_experts": part if shared else npy_text(np.array(prompt + part))} for part in (one, two)]
        response = {"choices": choices, "usage": usage} | ({"prompt_routed_experts": prompt} if shared else {})
        (tmp_path / "r.json").write_text(json.dumps(response))
        trace = import_trace(tmp_path / "r.json", "vllm")
        assert trace.expert_TLK[:, 0].tolist() == [[2, 3], [1, 2], [3, 1], [0, 1]]
        assert trace.sequence_T.tolist() == [0, 0, 0, 1]
        assert trace.position_T.tolist() == [0, 1, 2, 2]
        assert (trace.layer_ids, trace.metadata["hidden_layers"]) == ((1,), 2)
        account = trace.metadata["import"]
        assert account["read"]["tokens"] == 4 + (0 if shared else 2)
    response["usage"]["completion_tokens"] = 40
    (tmp_path / "r.json").write_text(json.dumps(response))
    with pytest.raises(ValueError, match="rows of routed experts for 2 prompt and 40 generated tokens"):
        import_trace(tmp_path / "r.json", "vllm")


def test_vllm_filler_of_the_last_token_and_rows_without_the_prompt(tmp_path):
    rows = [[[1, 2]], [[2, 3]], [[0, 0]]]
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    (tmp_path / "r.json").write_text(json.dumps({"choices": [{"routed_experts": rows}], "usage": usage}))
    trace = import_trace(tmp_path / "r.json")
    assert trace.position_T.tolist() == [5, 6]
    assert trace.metadata["import"]["left_out"][0]["count"] == 1


# --- SGLang -----------------------------------------------------------------------------------------------------------


def serve(requests, layers, random, hidden, chunk=4):
    """Records of a scheduler like SGLang's: prefills in chunks, decode passes in the order of the running batch."""
    K = requests[0].shape[2]
    slot_of = np.concatenate([np.arange(E), random.integers(0, E, 4)])
    slots = {expert: np.flatnonzero(slot_of == expert) for expert in range(E)}

    def record(rows, lengths):
        ids = np.full((hidden, len(rows), 4), -1, np.int32)
        for place, (request, token) in enumerate(rows):
            for index, layer in enumerate(layers):
                ids[layer, place, :K] = [random.choice(slots[e]) for e in requests[request][token, index].tolist()]
        return {
            "rank": 0,
            "forward_pass_id": len(records),
            "positions": [token for _, token in rows],
            "extend_seq_lens": lengths,
            "topk_ids_of_layer": torch.tensor(ids),
        }

    records, running, waiting = [], [], list(range(len(requests)))
    prompts = {r: int(random.integers(1, len(requests[r]) + 1)) for r in waiting}
    done = dict.fromkeys(waiting, 0)
    while waiting or running:
        if waiting and (not running or random.random() < 0.6):
            request = waiting[0]
            rows = min(chunk, prompts[request] - done[request])
            records.append(record([(request, done[request] + i) for i in range(rows)], [rows]))
            done[request] += rows
            if done[request] == prompts[request]:
                running.append(waiting.pop(0))
        running = [request for request in running if done[request] < len(requests[request])]
        if running:
            records.append(record([(request, done[request]) for request in running], None))
            for request in running:
                done[request] += 1
            running = [request for request in running if done[request] < len(requests[request])]
    return {"records": records, "last_physical_to_logical_map": torch.tensor(slot_of).repeat(hidden, 1)}


@property_test
@given(recorded=recordings())
def test_sglang_recordings_of_concurrent_requests(folder, recorded):
    """Lengths that differ make positions tell requests apart; so requests here begin at different times."""
    requests, layers, random = recorded
    requests = requests[:2]
    path = folder() / "d_0.pt"
    torch.save(serve(requests, layers, random, hidden=11), path)
    trace = import_trace(path)
    assert (trace.num_experts, trace.metadata["hidden_layers"]) == (E, 11)
    if not any("could continue" in note for note in trace.metadata["import"]["notes"]):
        expect_requests(trace, requests, layers, in_order=False)
    assert trace.num_tokens == sum(map(len, requests))


def test_sglang_decode_rows_of_equal_length_stay_with_their_requests():
    finder = RequestFinder()
    assert finder.prefill([2, 3], [0, 1, 0, 1, 2]) == [0, 0, 1, 1, 1]
    assert finder.decode([2, 3]) == [0, 1]
    # the first ends, a third begins, which was not recorded before
    assert finder.decode([4, 9]) == [1, 2]
    assert finder.decode([5, 10]) == [1, 2]
    assert finder.prefill([4], [0, 1, 2, 3]) == [3] * 4
    # its prompt goes on in a second chunk, beside decode rows in the same pass
    assert finder.prefill([2, 1], [4, 5, 6]) == [3, 3, 1]
    assert finder.ambiguous == 0


def sglang_file(path, rank=0, shift=0, **fields):
    ids = torch.tensor([[[(0 + shift) % 4, 5, -1], [4, 1, -1]]], dtype=torch.int32)
    record = {"rank": rank, "topk_ids_of_layer": ids, "extend_seq_lens": [2]} | fields
    torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 3, 0, 2]])}, path)


def test_sglang_ranks(tmp_path):
    sglang_file(tmp_path / "e_0.pt")
    trace = import_trace(tmp_path / "e_0.pt", "sglang", num_experts=4)
    assert trace.expert_TLK.tolist() == [[[0, 2]], [[0, 1]]]
    sglang_file(tmp_path / "e_1.pt", rank=1)
    with pytest.raises(ValueError, match=r"e_1\.pt lies beside it"):
        import_trace(tmp_path / "e_0.pt")
    assert import_trace(tmp_path).num_tokens == 2
    sglang_file(tmp_path / "e_1.pt", rank=1, shift=1)
    assert import_trace(tmp_path).sequence_T.tolist() == [0, 0, 1, 1]
    (tmp_path / "e_0.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks \[1\] and lacks those of \[0\]"):
        import_trace(tmp_path)
    sglang_file(tmp_path / "e_1.pt", forward_mode=5)
    with pytest.raises(ValueError, match="speculative"):
        import_trace(tmp_path)
    sglang_file(tmp_path / "e_1.pt", extend_seq_lens=None)
    with pytest.raises(ValueError, match="without positions"):
        import_trace(tmp_path)


@property_test
@given(recorded=recordings(least_k=2))
def test_sglang_responses(folder, recorded):
    requests, layers, _ = recorded
    K = requests[0].shape[2]
    responses = []
    for request in requests:
        ids = np.zeros((len(request), 11, K), np.int32)
        ids[:, layers] = request
        meta = {"prompt_tokens": 1, "completion_tokens": len(request)}
        text = base64.b64encode(ids.tobytes()).decode()
        responses.append({"text": "a", "meta_info": {**meta, "routed_experts": text}})
    path = folder() / "r.jsonl"
    write_lines(path, responses)
    expect_requests(import_trace(path, top_k=K), requests, layers)
    with pytest.raises(ValueError, match="give top_k"):
        import_trace(path)
    with pytest.raises(ValueError, match="do not divide"):
        import_trace(path, top_k=K * 11 * 7)


# --- Megatron ---------------------------------------------------------------------------------------------------------


def megatron_lines(request, layers, numbers, rank, step):
    return [
        {
            "step": step, "stage": "pre_dispatch", "block": "decoder", "layer": number, "rank": rank,
            "num_tokens": len(request), "topk": request.shape[2], "top_indices": request[:, layer].tolist(),
        }
        for layer, number in zip(layers, numbers, strict=True)
    ]  # fmt: skip


@property_test
@given(recorded=recordings(), data_ranks=st.integers(1, 2), micro=st.integers(1, 2))
def test_megatron_ranks_stages_and_micro_batches(folder, recorded, data_ranks, micro):
    """Stages hold layers of the same tokens, data-parallel ranks and micro-batches hold other tokens."""
    requests, layers, random = recorded
    L, K = requests[0].shape[1:]
    split = int(random.integers(1, L + 1))
    stages = [part for part in (range(split), range(split, L)) if len(part)]
    place, wanted = folder(), []
    lines = {rank: [] for rank in range(len(stages) * data_ranks)}
    for data_rank in range(data_ranks):
        for step in range(2):
            for _ in range(micro):
                request = np.argsort(random.random((3, L, E)), axis=2)[:, :, :K]
                wanted.append(request)
                for stage, part in enumerate(stages):
                    rank = stage * data_ranks + data_rank
                    lines[rank] += megatron_lines(request, part, [layers[i] for i in part], rank, step)
    for rank, records in lines.items():
        write_lines(place / f"router_trace_rank{rank}.jsonl", records)
    expect_requests(import_trace(place), wanted, layers)


def test_megatron_stages_that_count_from_zero(tmp_path):
    request = np.arange(8).reshape(2, 4, 1)
    for rank, part in enumerate(([0, 1], [2, 3])):
        write_lines(tmp_path / f"router_trace_rank{rank}.jsonl", megatron_lines(request, part, [0, 1], rank, 0))
    trace = import_trace(tmp_path, "megatron", pipeline_stages=2)
    assert (trace.layer_ids, trace.expert_TLK.tolist()) == ((0, 1, 2, 3), request.tolist())
    trace = import_trace(tmp_path, "megatron")
    assert (trace.num_tokens, trace.layer_ids) == (4, (0, 1))
    assert any("--pipeline-stages" in note for note in trace.metadata["import"]["notes"])
    with pytest.raises(ValueError, match="lies beside it"):
        import_trace(tmp_path / "router_trace_rank0.jsonl", "megatron")
    (tmp_path / "router_trace_rank0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks \[0\]"):
        import_trace(tmp_path, "megatron")


def test_megatron_drafts_are_counted_and_sizes_checked(tmp_path):
    (row,) = megatron_lines(np.array([[[1, 2]]]), [0], [4], 0, 0)
    path = tmp_path / "m.jsonl"
    write_lines(path, [row, {**row, "block": "mtp", "mtp_idx": 0}])
    trace = import_trace(path)
    assert trace.layer_ids == (4,)
    assert trace.metadata["import"]["left_out"] == [
        {"unit": "lines", "count": 1, "reason": "lines of another block (MTP) or stage"}
    ]
    write_lines(path, [{**row, "num_tokens": 3}])
    with pytest.raises(ValueError, match="top_indices must be"):
        import_trace(path)


# --- the others -------------------------------------------------------------------------------------------------------


def shuffled_rows(requests, layers, random):
    rows = [
        (f"request {number}", token, layer, request[token, index].tolist())
        for number, request in enumerate(requests)
        for token in range(len(request))
        for index, layer in enumerate(layers)
    ]
    return [rows[index] for index in random.permutation(len(rows))]


@property_test
@given(recorded=recordings(), form=st.sampled_from(["csv", "csv, no quotes", "columns", "jsonl", "parquet"]))
def test_plain_tables(folder, recorded, form):
    requests, layers, random = recorded
    K = requests[0].shape[2]
    rows = shuffled_rows(requests, layers, random)
    path = folder() / "t.csv"
    if form == "jsonl":
        path = path.with_suffix(".jsonl")
        names = ("request", "token", "layer", "experts")
        write_lines(path, [dict(zip(names, row, strict=True)) for row in rows])
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = zip(*rows, strict=True)
        table = pyarrow.table(dict(zip(("request", "token", "layer", "experts"), map(list, columns), strict=True)))
        path = path.with_suffix(".parquet")
        parquet.write_table(table, path)
    else:
        names = ",".join(f"e{slot}" for slot in range(K)) if form == "columns" else "experts"
        separator = "," if form == "columns" else " "
        cells = [separator.join(map(str, ids)) for *_, ids in rows]
        if form == "csv, no quotes":
            cells = [f"[{', '.join(map(str, ids))}]" for *_, ids in rows]
        lines = [f"{row[0]},{row[1]},{row[2]},{cell}" for row, cell in zip(rows, cells, strict=True)]
        path.write_text(f"request,token,layer,{names}\n" + "\n".join(lines) + "\n")
    expect_requests(import_trace(path), requests, layers, in_order=False)


@property_test
@given(recorded=recordings(), repeats=st.integers(0, 3))
def test_vllm_route_lines_with_repeats(folder, recorded, repeats):
    requests, layers, random = recorded
    lines = [
        {"type": "route", "req_id": name, "token_idx": token, "layer": layer, "topk_ids": ids}
        for name, token, layer, ids in shuffled_rows(requests, layers, random)
    ]
    path = folder() / "r.jsonl"
    write_lines(path, [{"type": "meta"}, *lines, *lines[:repeats]])
    trace = import_trace(path)
    expect_requests(trace, requests, layers, in_order=False)
    left_out = {part["reason"][:5]: part["count"] for part in trace.metadata["import"]["left_out"]}
    assert left_out.get("the s", 0) == min(repeats, len(lines))
    assert left_out["lines"] == 1


def test_vllm_route_lines_that_count_anew_in_each_pass(tmp_path):
    """As the public recording of Qwen1.5-MoE has them: one req_id, a warm-up pass, then passes of running requests."""
    passes = [[[43, 5]] * 300, [[1, 2], [3, 4], [5, 6]], [[2, 7], [4, 8]]]
    lines = [
        {"type": "route", "req_id": "r1", "token_idx": token, "layer": layer, "topk_ids": ids}
        for rows in passes
        for layer in (0, 4)
        for token, ids in enumerate(rows)
    ]
    path = tmp_path / "r.jsonl"
    write_lines(path, [{"type": "meta"}, *lines])
    trace = import_trace(path)
    assert trace.expert_TLK[:, 0].tolist() == [*passes[1], *passes[2]]
    assert trace.sequence_T.tolist() == [0, 0, 0, 1, 1]
    account = trace.metadata["import"]
    assert [part["count"] for part in account["left_out"]] == [1, 600]
    assert any("each pass counts as one request" in note for note in account["notes"])
    lines[-1]["token_idx"] = 0
    write_lines(path, lines)
    with pytest.raises(ValueError, match="no row for layers"):
        import_trace(path)
    # layer 4 does not count anew: nothing of it may be lost
    lines[-1]["token_idx"] = 7
    write_lines(path, lines)
    with pytest.raises(ValueError, match="cannot be told apart"):
        import_trace(path)


def test_rows_that_contradict_or_are_missing_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("request,token,layer,experts\na,0,3,1 2\na,0,3,1 4\n")
    with pytest.raises(ValueError, match="cannot be told apart"):
        import_trace(path)
    path.write_text("request,token,layer,experts\na,0,3,1\na,0,5,2\na,1,3,1\na,2,3,1\na,2,5,1\n")
    with pytest.raises(ValueError, match=r"token 1 has no row for layers \[5\]"):
        import_trace(path)
    path.write_text("request,token,layer,experts\na,0,3,1\na,0,5,2\na,1,3,1\n")
    trace = import_trace(path)
    assert trace.num_tokens == 1
    assert trace.metadata["import"]["left_out"][0]["unit"] == "tokens"
    path.write_text("request,token,layer,experts\na,0,3,1\na,0,5,\n")
    assert import_trace(path).expert_TLK.tolist() == [[[1], [-1]]]


@property_test
@given(recorded=recordings(), is_batch=st.booleans(), suffix=st.sampled_from([".npz", ".safetensors"]))
def test_router_logits(folder, recorded, is_batch, suffix):
    requests, layers, random = recorded
    requests = requests if is_batch else requests[:1]
    K, longest = requests[0].shape[2], max(map(len, requests))
    logits = random.normal(size=(len(requests), longest, len(layers), E)).astype(np.float32)
    mask = np.zeros((len(requests), longest), np.int64)
    for number, request in enumerate(requests):
        mask[number, : len(request)] = 1
        for slot in range(K):
            np.put_along_axis(logits[number, : len(request)], request[:, :, slot : slot + 1], 100.0 - slot, axis=2)
    arrays = {f"layer_{layer}": np.ascontiguousarray(logits[:, :, i]) for i, layer in enumerate(layers)}
    arrays = arrays | {"attention_mask": mask} if is_batch else {name: array[0] for name, array in arrays.items()}
    path = (folder() / "logits").with_suffix(suffix)
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    trace = import_trace(path, top_k=K)
    assert trace.num_experts == E
    expect_requests(trace, requests, layers)


def test_router_logits_of_a_model_of_transformers(tmp_path):
    """The lines of docs/traces.md, against the experts that the gates chose; layers 0 and 2 are dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
    chosen = {}
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]
    for i in layers:
        model.model.layers[i].mlp.gate.register_forward_hook(lambda _, __, output, i=i: chosen.update({i: output[-1]}))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    batch = {"input_ids": torch.randint(0, 64, (2, 5)), "attention_mask": mask}
    with torch.no_grad():
        out = model(**batch, output_router_logits=True)
    logits = {
        f"layer_{i}": l.float().cpu().numpy().reshape(2, 5, -1) for i, l in zip(layers, out.router_logits, strict=True)
    }
    np.savez(tmp_path / "logits.npz", **logits, attention_mask=mask.numpy())
    trace = import_trace(tmp_path / "logits.npz", top_k=2)
    assert (trace.layer_ids, trace.num_experts, trace.num_tokens) == ((1, 3), 8, 8)
    for index, layer in enumerate(layers):
        valid = mask.flatten().bool()
        assert trace.expert_TLK[:, index].tolist() == chosen[layer][valid].tolist()


def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_none(tmp_path):
    header = b"{}".ljust(0x80)
    path = tmp_path / "l.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert binary_kind(path) == "a safetensors file"


def test_router_logits_say_what_they_lack(tmp_path):
    path = tmp_path / "l.npz"
    np.savez(path, layer_10=np.array([[0.0, 2, 1]]), layer_2=np.array([[5.0, 2, 1]]))
    trace = import_trace(path, "hf-logits", top_k=2)
    assert (trace.expert_TLK.tolist(), trace.layer_ids, trace.num_experts) == ([[[0, 1], [1, 2]]], (2, 10), 3)
    with pytest.raises(ValueError, match="give top_k"):
        import_trace(path, "hf-logits")
    np.savez(path, layer_2=np.array([[np.nan, 2, 1]]))
    with pytest.raises(ValueError, match="NaN"):
        import_trace(path, "hf-logits", top_k=1)
    np.savez(path, np.array([[0.0, 1]]), np.array([[1.0, 0]]))
    assert import_trace(path, "hf-logits", top_k=1).layer_ids is None


@property_test
@given(recorded=recordings())
def test_layer_csv(folder, recorded):
    requests, layers, random = recorded
    rows = np.concatenate(requests)
    lines = {layer: [f"{layer},{' '.join(map(str, row[i]))}" for row in rows] for i, layer in enumerate(layers)}
    left = [layer for layer in layers for _ in rows]
    order = [left[index] for index in random.permutation(len(left))]
    path = folder() / "c.csv"
    path.write_text("layer_id,expert_ids\n" + "\n".join(lines[layer].pop(0) for layer in order) + "\n")
    trace = import_trace(path)
    assert (trace.layer_ids, trace.expert_TLK.tolist()) == (tuple(layers), rows.tolist())


@property_test
@given(recorded=recordings(), through=st.booleans())
def test_exflow(folder, recorded, through):
    requests, _, _ = recorded
    expert_TL = np.concatenate(requests)[:, :, 0]
    L = expert_TL.shape[1]
    path = folder() / "x.npy"
    np.save(path, expert_TL + E * np.arange(L) if through else expert_TL)
    assert import_trace(path, num_experts=E).expert_TLK[:, :, 0].tolist() == expert_TL.tolist()


def test_exflow_without_the_number_of_experts(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[0, 5], [3, 4]]))
    trace = import_trace(path, "exflow")
    assert (trace.expert_TLK[:, :, 0].tolist(), trace.num_experts) == ([[0, 1], [3, 0]], 4)
    np.save(path, np.array([[0, 9], [3, 9]]))
    with pytest.raises(ValueError, match="with 5 to 9 experts; say num_experts"):
        import_trace(path)


@property_test
@given(recorded=recordings(least_k=2))
def test_npz_requests(folder, recorded):
    requests, _, _ = recorded
    place = folder()
    for number, request in enumerate(requests):
        ids = {"prompt_token_ids": np.zeros(len(request)), "output_token_ids": np.zeros(1)}
        np.savez(place / f"{number}.npz", routed_experts=request, request_id=np.array(f"r{number}"), **ids)
    expect_requests(import_trace(place), requests, None)
    np.savez(place / "0.npz", routed_experts=requests[0], prompt_token_ids=np.zeros(99), output_token_ids=np.zeros(9))
    with pytest.raises(ValueError, match="99 prompt and 9 generated"):
        import_trace(place)


# --- what all share ---------------------------------------------------------------------------------------------------

CONTENTS = {
    "text": b"no recording at all\n",
    "json": b'{"a": 1}\n',
    "zip": b"PK\x03\x04 and nothing behind",
    "pickle": b"\x80\x02}q\x00.",
    "npy": b"\x93NUMPY\x01\x00",
    "latin-1": b"request,token,layer,experts\n\xe4,0,0,1\n",
    "cut off": b'{"step": 0, "layer": 1, "top_ind',
    "empty": b"",
    "NaN": b'{"request": "a", "token": NaN, "layer": 0, "experts": [1]}\n',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["auto", *IMPORTERS])
def test_what_is_no_recording_is_one_clear_line(tmp_path, name, content):
    path = tmp_path / "bad"
    path.write_bytes(CONTENTS[content])
    with pytest.raises(ValueError, match="bad") as error:
        import_trace(path, name, top_k=1)
    text = str(error.value)
    assert "\n" not in text
    assert not any(word in text for word in ("KeyError", "codec", "Unpickling", "Traceback", "JSONDecode"))
    assert name == "auto" or f"format {name}" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": "x"}, "rank must be a whole number"),
        ({"extend_seq_lens": 5}, "extend_seq_lens: expected integers"),
        ({"extend_seq_lens": [3]}, "do not add up to 2 tokens"),
        ({"positions": "ab"}, "positions: expected integers"),
        ({"positions": [0]}, "1 positions for 2 tokens"),
        ({"topk_ids_of_layer": torch.ones(1, 2, 3)}, "expected integers"),
        ({"topk_ids_of_layer": torch.ones(1, 2, 3).bfloat16()}, "no numbers"),
        ({"topk_ids_of_layer": torch.full((1, 2, 3), 6)}, "expert id 6"),
        ({"topk_ids_of_layer": torch.full((1, 2, 3), -1)}, "no layer routed a token"),
        ({"topk_ids_of_layer": torch.ones((2, 2, 3), dtype=torch.int32)}, "has 2 layers, the map 1"),
        ({"forward_pass_id": 1.5}, "forward_pass_id must be a whole number"),
    ],
)
def test_odd_records_of_sglang_are_one_clear_line(tmp_path, fields, words):
    sglang_file(tmp_path / "e.pt", **fields)
    with pytest.raises(ValueError, match=words):
        import_trace(tmp_path / "e.pt")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"token": 10**20}, r"token must be a whole number in 0\.\.2147483647"),
        ({"token": 4_000_000_000}, "token must be a whole number"),
        ({"token": True}, "got True"),
        ({"layer": -1}, "layer must be a whole number"),
        ({"experts": [10**20]}, "expected integers"),
        ({"experts": [1.0]}, "expected integers"),
        ({"experts": [40000]}, "at most 32767"),
        ({"experts": [-2]}, "do not fit"),
    ],
)
def test_odd_rows_are_one_clear_line(tmp_path, record, words):
    write_lines(tmp_path / "t.jsonl", [{"request": "a", "token": 0, "layer": 0, "experts": [1]} | record])
    with pytest.raises(ValueError, match=words):
        import_trace(tmp_path / "t.jsonl")


def test_a_wrong_format_is_named_with_the_right_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("request,token,layer,experts\na,0,3,1 2\n")
    with pytest.raises(ValueError, match="by its content it is --format table"):
        import_trace(path, "csv")
    with pytest.raises(ValueError, match="unknown trace format 'vlm' \\(did you mean 'vllm'\\?\\)"):
        import_trace(path, "vlm")
    path.write_text('{"layer": 1, "step": 0, "rank": 0}\n')
    with pytest.raises(ValueError, match="'num_tokens' is missing; the keys are 'layer', 'step', 'rank'"):
        import_trace(path, "megatron")


def test_experts_are_said_known_or_called_a_guess(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("request,token,layer,experts\na,0,3,1 6\na,1,3,7 2\n")
    trace = import_trace(path)
    assert trace.num_experts == 8
    assert any("is a guess" in note for note in trace.metadata["import"]["notes"])
    assert not import_trace(path, num_experts=16).metadata["import"]["notes"]
    zero = import_trace(path, num_experts=6, zero_experts=2)
    assert zero.expert_TLK.tolist() == [[[1, -1]], [[-1, 2]]]
    assert zero.metadata["import"]["left_out"][0] == {
        "unit": "slots",
        "count": 2,
        "reason": "slots of zero-compute experts, now empty",
    }
    with pytest.raises(ValueError, match="need zero_experts"):
        import_trace(path, num_experts=6)
    with pytest.raises(ValueError, match="give num_experts too"):
        import_trace(path, zero_experts=2)


def test_the_command_says_what_it_took_kept_and_left_out(tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.csv"
    path.write_text("request,token,layer,experts\na,0,3,1 2\na,0,3,1 2\na,0,5,2 3\nb,0,3,0 1\nb,0,5,3 1\n")
    monkeypatch.setattr("sys.argv", ["expertier", "trace", "import", str(path), "--out", str(tmp_path / "t.npz")])
    with pytest.raises(SystemExit) as finished:
        cli.main()
    assert not finished.value.code
    said = capsys.readouterr().out
    assert "read table: 5 lines, 2 tokens, 2 layers" in said
    assert "left out 1 lines: the same request, token, layer and experts once more" in said
    assert "2 tokens of 2 requests, 2 MoE layers (decoder layers 3, 5), 4 experts, top-2" in said
    assert RoutingTrace.load(tmp_path / "t.npz").layer_ids == (3, 5)


def test_layer_numbers_of_a_trace_are_checked():
    for ids in ([3], [5, 3], [3, 3], [-1, 2], ["3", "5"], [3.0, 5.0]):
        with pytest.raises(ValueError, match="layer_ids"):
            RoutingTrace(
                expert_TLK=np.zeros((1, 2, 1), np.int16),
                sequence_T=np.zeros(1, np.int32),
                metadata={"layer_ids": ids},
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_json_is_not_written_with_numbers_that_it_cannot_say(tmp_path, value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_json(tmp_path / "f.json", value)
    assert not list(tmp_path.iterdir())
