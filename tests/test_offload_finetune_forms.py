"""Fine-tuning on stored forms and on other families: adapters see the weights that the form stands for."""

import numpy as np
import pytest
import torch
from peft import PeftModel

import offload
from experiments.evidence.resident import load_resident
from offload.finetune.examples import PackedRows
from offload.finetune.methods.adapters import Adapters
from offload.finetune.methods.forward_only import ForwardOnly
from tests.test_offload_finetune_lora import relative
from tests.test_offload_formats_quantised import make_folders
from tests.test_offload_runtime_families import _small_model

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 12
FORMS = ("mxfp4 packed", "fp8 blocks F32", "int4", "nf4", "gptq")
FAMILIES = ("gpt_oss", "mixtral", "deepseek_v2", "granitemoe", "qwen3_next", "nemotron_h", "aria_text")


def options(method="lora", **changes):
    return offload.TuneOptions(
        method=method, steps=1, sequence_length=LENGTH, batch_size=2, rank=2, targets=(), **changes
    )


def random_rows(vocab_size=64):
    token_NS = np.random.default_rng(0).integers(3, vocab_size, (2, LENGTH))
    return PackedRows(token_NS, token_NS, "random")


def gradients(model, out, rows, settings, **memory):
    method = Adapters(model, out, settings, rows, **memory)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in method._trained:
            value.normal_(0.0, 0.1)
    method.gradients(0)
    out.mkdir(exist_ok=True)
    method.publish(out)
    found = {name: value.grad.clone() for name, value in method.peft.named_parameters() if value.requires_grad}
    method.close()
    return found


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_a_quantised_model_gives_the_gradients_of_its_plain_twin(form, tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.set_num_threads(1)
    quantised, _ = make_folders(tmp_path, form)
    found, expected = (
        gradients(folder, tmp_path / f"adapter{slots}", random_rows(), options(), cache_experts=slots)
        for folder, slots in ((quantised, 2), (tmp_path / "plain", 5))
    )
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert sum(value.count_nonzero() for value in found.values())
    with pytest.raises(ValueError, match="expertier dequantise"):
        ForwardOnly(quantised, tmp_path / "zo", options("zo"), random_rows(), cache_experts=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_other_families(family, tmp_path):
    torch.set_num_threads(1)
    _small_model(family, torch.float32).save_pretrained(tmp_path / "model")
    rows = random_rows(96)
    found = gradients(tmp_path / "model", tmp_path / "adapter", rows, options(), cache_experts=3)
    resident = load_resident(tmp_path / "model", experts_implementation="eager")
    peft = PeftModel.from_pretrained(resident, tmp_path / "adapter", is_trainable=True)
    ids, labels = rows.batch(0, 0, 1, 2, 0)
    logits = peft(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).backward()
    expected = {name: value.grad for name, value in peft.named_parameters() if value.requires_grad}
    assert set(found) == set(expected)
    assert relative(found, expected) < 3e-6
