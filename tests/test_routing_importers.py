import json

import numpy as np
import pytest
import torch

from routing.traces.importers import import_trace


def test_vllm_responses(tmp_path):
    lines = [
        {"prompt_routed_experts": [[[0, 1], [2, 3]]], "routed_experts": [[[1, 2], [3, 0]]]},
        {"routed_experts": [[[3, 1], [0, 2]]]},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = import_trace(path, "vllm")
    assert trace.expert_TLK.tolist() == [[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 1], [0, 2]]]
    assert trace.sequence_T.tolist() == [0, 0, 1]


def test_megatron_jsonl(tmp_path):
    rows = [
        {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": 2, "topk": 1,
         "top_indices": [[layer], [layer + 1]]}
        for layer in (2, 4)
    ]  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert import_trace(path, "megatron").expert_TLK.tolist() == [[[2], [4]], [[3], [5]]]
    path.write_text(json.dumps({**rows[0], "num_tokens": 3}))
    with pytest.raises(ValueError, match="top_indices"):
        import_trace(path, "megatron")


def test_router_logits_need_top_k(tmp_path):
    logits = {"layer_10": np.array([[0.0, 2, 1]]), "layer_2": np.array([[5.0, 2, 1]])}
    path = tmp_path / "l.npz"
    np.savez(path, **logits)
    assert import_trace(path, "hf-logits", top_k=2).expert_TLK.tolist() == [[[0, 1], [1, 2]]]
    with pytest.raises(ValueError, match="top_k"):
        import_trace(path, "hf-logits")


def test_sglang_per_token_maps_physical_ids_to_logical_ones(tmp_path):
    record = {
        "topk_ids_of_layer": torch.tensor([[[0, 5, -1], [4, 1, -1]]], dtype=torch.int32),
        "extend_seq_lens": [2],
    }
    path = tmp_path / "e.pt"
    torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 3, 0, 2]])}, path)
    trace = import_trace(path, "sglang", num_experts=4)
    assert trace.expert_TLK.tolist() == [[[0, 2]], [[0, 1]]]
    assert trace.sequence_T.tolist() == [0, 0]


def test_exflow_csv_and_npz(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[0, 5], [3, 4]]))
    assert import_trace(tmp_path / "x.npy", "exflow").expert_TLK[:, :, 0].tolist()[0][0] == 0
    (tmp_path / "c.csv").write_text("layer_id,expert_ids\n0,1 2\n1,0 3\n0,2 0\n1,1 2\n")
    assert import_trace(tmp_path / "c.csv", "csv").expert_TLK.tolist() == [[[1, 2], [0, 3]], [[2, 0], [1, 2]]]
    np.savez(tmp_path / "n.npz", routed_experts=np.array([[[0, 1]], [[1, 2]]]))
    assert import_trace(tmp_path / "n.npz", "npz").expert_TLK.tolist() == [[[0, 1]], [[1, 2]]]


@pytest.mark.parametrize("name", ["vllm", "megatron", "exflow", "csv", "sglang"])
def test_damaged_files_are_one_value_error(tmp_path, name):
    path = tmp_path / "bad"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(ValueError, match="bad"):
        import_trace(path, name)
    with pytest.raises(ValueError, match="unknown trace format"):
        import_trace(path, "magic")
