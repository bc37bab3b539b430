"""FFN-Skip on offloaded models: what is left out reads nothing, and the tokens are the resident model's."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import offload
from moe import skip_feed_forward
from tests.test_offload_runtime_families import _small_config

IDS = torch.tensor([[7, 3, 11, 5, 2]])
NEW = 6


def generated(model, threshold):
    with skip_feed_forward(model, threshold=threshold, warm_up=0) as report:
        ids = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    return ids, report


def test_a_skipped_layer_reads_nothing(tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = _small_config("olmoe", {"num_hidden_layers": 4})
    config.eos_token_id = None
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    model = offload.load(tmp_path, cache_experts=1)
    asked = {}
    for threshold in (-1.0, 1.1):  # after the first layer everything, and nothing
        expected, _ = generated(resident, threshold)
        model.offload.reset()
        found, report = generated(model, threshold)
        assert torch.equal(found, expected)
        asked[threshold] = [layer.hits + layer.misses for layer in model.offload.runtime.counters.layers]
        assert report.skipped == ([0, 0, NEW - 1, 0] if threshold < 0 else [0] * 4)
    # top 2 of each decoded token are not asked for in the layer that skips
    assert [more - less for less, more in zip(asked[-1.0], asked[1.1], strict=True)] == [0, 0, 2 * (NEW - 1), 0]
    model.offload.close()


@pytest.mark.parametrize("threshold", ["0", "1.5"])
def test_a_threshold_is_a_cosine(threshold, run, tmp_path):
    assert run("generate", tmp_path, "--prompt", "a", "--skip-ffn", threshold) == 2
