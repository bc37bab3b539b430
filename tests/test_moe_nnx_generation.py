"""Generation in the Flax twin: the tokens that torch's greedy `generate` gives from the same checkpoint."""

import numpy as np
import pytest
import torch

from moe import MoEForCausalLM

pytest.importorskip("jax", reason="needs the extra expertier[jax]")
pytest.importorskip("flax", reason="needs the extra expertier[jax]")

from moe.nnx import generate, load_pretrained
from tests.test_moe_nnx_parity import VARIANTS

NEW = 9
FAST = "top2"
OTHERS = (FAST, "olmoe-dense-shared", "qwen3-tied", "deepseek-v3", "moepp", "rmoe", "pregate", "tutel")


def both(tiny_config, tmp_path, name, layers=2):
    torch.manual_seed(0)
    right = MoEForCausalLM(tiny_config(**({"num_hidden_layers": layers} | VARIANTS[name]))).eval()
    right.save_pretrained(tmp_path)
    return right, load_pretrained(tmp_path)


def expect_same_tokens(right, ours):
    random = np.random.default_rng(0)
    token_BS = random.integers(1, 96, (3, 6))
    mask = np.ones_like(token_BS)
    mask[1, :4], mask[2, :1] = 0, 0
    token_BS[mask == 0] = 0
    given = {"attention_mask": torch.from_numpy(mask), "do_sample": False, "pad_token_id": 0}
    free = right.generate(torch.from_numpy(token_BS), max_new_tokens=NEW, **given).numpy()
    found = generate(ours, token_BS, max_new_tokens=NEW, attention_mask=mask)
    np.testing.assert_array_equal(found, free)
    # an answer ends with a token that the first row gives in its midst, and the others go on
    end = int(free[0, 6 + NEW // 2])
    ended = right.generate(torch.from_numpy(token_BS), max_new_tokens=NEW, eos_token_id=end, **given).numpy()
    found = generate(ours, token_BS, max_new_tokens=NEW, attention_mask=mask, end_id=end)
    np.testing.assert_array_equal(found, ended)


def test_greedy_tokens_are_those_of_torch(tiny_config, tmp_path):
    # one layer: what compiles is what this takes
    expect_same_tokens(*both(tiny_config, tmp_path, FAST, layers=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_greedy_tokens_are_those_of_torch_with_other_routers(tiny_config, tmp_path, name):
    expect_same_tokens(*both(tiny_config, tmp_path, name))


@pytest.mark.slow
def test_a_prompt_of_one_token_and_an_answer_of_one(tiny_config, tmp_path):
    right, ours = both(tiny_config, tmp_path, FAST)
    token_BS = np.array([[5], [40]])
    for count in (1, 3):
        expected = right.generate(torch.from_numpy(token_BS), max_new_tokens=count, do_sample=False).numpy()
        np.testing.assert_array_equal(generate(ours, token_BS, max_new_tokens=count), expected)


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (np.zeros((1, 0), int), {"max_new_tokens": 1}, "expected a prompt"),
        (np.ones((1, 2), int), {"max_new_tokens": 0}, "at least 1 new token"),
        (np.ones((1, 2), int), {"max_new_tokens": 1, "attention_mask": np.array([[1, 0]])}, "must end with ones"),
    ],
)
def test_what_cannot_be_continued_is_refused(tokens, given, message):
    with pytest.raises(ValueError, match=message):
        generate(None, tokens, **given)
