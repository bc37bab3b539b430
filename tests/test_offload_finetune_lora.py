"""Adapters of a frozen offloaded model: gradients and files are PEFT's, whatever the number of slots."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import offload
from experiments.evidence.resident import load_resident
from offload.finetune.examples import NO_LOSS
from offload.finetune.methods.adapters import Adapters
from offload.finetune.methods.expert_adapters import most_used
from routing.traces import RoutingTrace
from tests.small_tuning import LENGTH, rows_of, save_models

OPTIONS = offload.TuneOptions(
    method="lora",
    steps=3,
    sequence_length=LENGTH,
    batch_size=2,
    accumulation=2,
    learning_rate=1e-3,
    rank=4,
    targets=("q_proj", "o_proj"),
    adapt_routers=True,
    checkpoint_every=2,
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("lora"), "float64", "float32", "bfloat16")


def gradients(folder, model, out, options=OPTIONS, **memory):
    """A step's gradients by PEFT's names, of adapters that are not zero; the adapter is written to `out`."""
    rows = rows_of(folder / "float32", folder / "data.jsonl")
    method = Adapters(model, out, options, rows, **memory)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in method._trained:
            value.normal_(0.0, 0.05)
    method.gradients(0)
    out.mkdir(exist_ok=True)
    method.publish(out)
    found = {name: value.grad.clone() for name, value in method.peft.named_parameters() if value.requires_grad}
    method.close()
    return found


def resident_gradients(folder, resident, out, options=OPTIONS):
    """The same by PEFT alone, on a model in memory with the adapter that was written."""
    peft = PeftModel.from_pretrained(resident, out, is_trainable=True)
    rows = rows_of(folder / "float32", folder / "data.jsonl")
    batches = [rows.batch(0, micro, options.accumulation, options.batch_size, options.seed) for micro in (0, 1)]
    num_learnt = sum(int((labels[:, 1:] != NO_LOSS).sum()) for _, labels in batches)
    for ids, labels in batches:
        logits = peft(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        (loss / num_learnt).backward()
    return {name: value.grad for name, value in peft.named_parameters() if value.requires_grad}


def relative(found, expected):
    error = sum((found[name] - value).square().sum().item() for name, value in expected.items())
    return (error / sum(value.square().sum().item() for value in expected.values())) ** 0.5


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-13), ("float32", 1e-6)])
def test_gradients_are_those_of_peft_on_the_resident_model(folder, dtype, most, tmp_path):
    found = gradients(folder, folder / dtype, tmp_path / "adapter", cache_experts=2)
    resident = load_resident(folder / dtype, experts_implementation="eager")
    expected = resident_gradients(folder, resident, tmp_path / "adapter")
    assert set(found) == set(expected)
    assert any("experts" in name for name in found)
    assert any("gate." in name for name in found)
    assert all(value.count_nonzero() for value in expected.values())
    assert relative(found, expected) < most


def test_runs_are_equal_at_every_number_of_slots_and_continue_bit_by_bit(folder):
    def tune(name, options=OPTIONS, **changes):
        offload.fine_tune(folder / "bfloat16", folder / "data.jsonl", folder / name, options, **changes)
        return load_file(folder / name / "adapter_model.safetensors")

    expected = tune("all", cache_experts=8)
    tune("part", dataclasses.replace(OPTIONS, steps=2), cache_experts=1)
    found = tune("part", cache_experts=3, resume=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert any(value.count_nonzero() for name, value in found.items() if "experts" in name and "lora_B" in name)


def test_shared_adapters_are_those_of_one_adapter_for_all_experts(folder, tmp_path):
    options = dataclasses.replace(OPTIONS, experts="shared", targets=(), adapt_routers=False)
    rows = rows_of(folder / "float32", folder / "data.jsonl")
    grads = []
    for slots in (1, 8):
        method = Adapters(folder / "float64", tmp_path, options, rows, cache_experts=slots)
        torch.manual_seed(3)
        with torch.no_grad():
            for value in method._trained:
                value.normal_(0.0, 0.05)
        method.gradients(0)
        grads.append([value.grad.clone() for value in method.of_experts.parameters])
        (tmp_path / "shared").mkdir(exist_ok=True)
        method.publish(tmp_path / "shared")
        method.close()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    resident = load_resident(folder / "float64", experts_implementation="eager")
    expected = resident_gradients(folder, resident, tmp_path / "shared", options)
    of_layer = [value for name, value in expected.items() if "layers.0.mlp.experts.base_layer" in name]
    assert torch.allclose(grads[0][2], of_layer[0].view(8, 4, -1).sum(0), rtol=1e-9)
    assert torch.allclose(grads[0][3], of_layer[1].view(-1, 4, 8).sum(-1), rtol=1e-9)


def usage_trace(file, chosen_LE):
    """A trace in which expert `e` of a layer is chosen as often as the layer's list says."""
    columns = [np.repeat(np.arange(8), counts) for counts in chosen_LE]
    expert_TLK = np.stack(columns, axis=1)[:, :, None].astype(np.int16)
    RoutingTrace(
        expert_TLK=expert_TLK, sequence_T=np.zeros(len(expert_TLK), np.int32), metadata={"num_experts": 8}
    ).save(file)
    return str(file)


def test_the_most_used_experts_have_adapters_by_hand(folder, tmp_path):
    usage = usage_trace(tmp_path / "usage.npz", [[1, 5, 0, 2, 2, 0, 0, 0], [0, 0, 3, 0, 3, 0, 4, 0]])
    owners = most_used(RoutingTrace.load(usage), 0.25, [8, 8])
    # of equals, 3 and 4 of the first layer, the lower id goes first
    assert owners == [[None, 0, None, 1, None, None, None, None], [None, None, 0, None, None, None, 1, None]]
    with pytest.raises(ValueError, match="2 layers of 8 experts, the model 3 of 8"):
        most_used(RoutingTrace.load(usage), 0.25, [8, 8, 8])
    with pytest.raises(ValueError, match="come together"):
        dataclasses.replace(OPTIONS, experts="used")
    options = dataclasses.replace(OPTIONS, experts="used", usage=usage, targets=(), adapt_routers=False)
    rows = rows_of(folder / "float32", folder / "data.jsonl")
    grads = []
    for slots in (1, 8):
        method = Adapters(folder / "float64", tmp_path, options, rows, cache_experts=slots)
        torch.manual_seed(3)
        with torch.no_grad():
            for value in method._trained:
                value.normal_(0.0, 0.05)
        method.gradients(0)
        grads.append([value.grad.clone() for value in method.of_experts.parameters])
        (tmp_path / "used").mkdir(exist_ok=True)
        method.publish(tmp_path / "used")
        method.close()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    # PEFT loads the file by itself, and its gradients at the chosen experts are ours
    resident = load_resident(folder / "float64", experts_implementation="eager")
    expected = resident_gradients(folder, resident, tmp_path / "used", options)
    of_layer = [value for name, value in expected.items() if "layers.0.mlp.experts.base_layer" in name]
    b_OrE = of_layer[1].view(-1, 4, 8)
    for place, expert in enumerate((1, 3)):
        first = 4 * place
        assert torch.allclose(grads[0][first + 2], of_layer[0].view(8, 4, -1)[expert], rtol=1e-9)
        assert torch.allclose(grads[0][first + 3], b_OrE[:, :, expert], rtol=1e-9)
    saved = load_file(tmp_path / "used" / "adapter_model.safetensors")
    (written,) = [value for name, value in saved.items() if "layers.0" in name and "base_layer.lora_B" in name]
    assert [e for e in range(8) if written.view(-1, 4, 8)[:, :, e].any()] == [1, 3]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_serving_unmerged_equals_peft_on_the_resident_model(folder, dtype, tmp_path):
    gradients(folder, folder / dtype, tmp_path / "adapter", cache_experts=2)
    resident = PeftModel.from_pretrained(load_resident(folder / dtype), tmp_path / "adapter").eval()
    served = offload.load(folder / dtype, cache_experts=3, adapter=tmp_path / "adapter")
    for ids in (torch.arange(3, 30).view(1, -1), torch.tensor([[7]])):
        with torch.no_grad():
            found, expected = served(ids, use_cache=False).logits, resident(ids, use_cache=False).logits
            without = load_resident(folder / dtype)(ids, use_cache=False).logits
        most = 1e-5 if dtype == "float32" else 4e-2
        assert (found - expected).norm() < most * expected.norm()
        assert (found - without).norm() > 2 * most * expected.norm()
    assert served.generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0).shape == (1, 5)
    served.offload.close()


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"expected adapter_config\.json"):
        offload.load(folder / "float32", cache_experts=3, adapter=tmp_path)
