"""The choice of a token against probabilities computed by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from offload.engine.request import GenerationRequest, Sampling
from offload.engine.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def sampler(prompt=(0,), constraint=None, **options):
    return Sampler(
        GenerationRequest(prompt_ids=prompt, max_new_tokens=9, sampling=Sampling(**options), constraint=constraint)
    )


def shares(count=4000, logits=LOGITS, **options):
    """How often each token is drawn, by samplers with different seeds."""
    drawn = Counter(sampler(seed=seed, **options).choose(logits).token_id for seed in range(count))
    return [drawn[token] / count for token in range(len(logits))]


def softmax(values):
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_equal_ones():
    assert sampler().choose(LOGITS).token_id == 1


def test_draws_follow_the_probabilities():
    # 4,000 draws: a standard deviation is below 0.008
    assert shares(temperature=1.0) == pytest.approx(softmax(LOGITS.tolist()), abs=0.03)
    assert shares(temperature=2.0) == pytest.approx(softmax((LOGITS / 2).tolist()), abs=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {3, 1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 0.5}, {1, 3}),
    ],
)
def test_warpers_keep_the_likeliest_tokens(options, kept):
    found = {token for token, share in enumerate(shares(count=1500, temperature=1.0, **options)) if share}
    assert found <= kept
    assert found or kept == {0}
    if options != {"top_k": 1}:
        assert found == kept


def test_penalties_change_the_logits_of_tokens_that_were_seen():
    flat = torch.tensor([2.0, 1.9, 1.0, -0.5])
    frequent = sampler(frequency_penalty=0.06)
    assert [frequent.choose(flat).token_id for _ in range(6)] == [0, 0, 1, 0, 1, 0]
    present = sampler(presence_penalty=0.2)
    assert [present.choose(flat).token_id for _ in range(3)] == [0, 1, 0]
    # 2.0 / 1.5 = 1.33 < 1.9; the prompt counts as well
    assert sampler(prompt=(0,), repetition_penalty=1.5).choose(flat).token_id == 1
    assert sampler(prompt=(3,), repetition_penalty=1.5).choose(flat).token_id == 0


def test_bias_moves_and_forbids_tokens():
    assert sampler(logit_bias={2: 1.5}).choose(LOGITS).token_id == 2
    assert sampler(logit_bias={1: -100.0}).choose(LOGITS).token_id == 3
    huge = torch.tensor([500.0, 0.0])
    assert sampler(logit_bias={0: -100.0}).choose(huge).token_id == 1


def test_log_probabilities_are_the_models_own():
    event = sampler(top_logprobs=2, logit_bias={2: 50.0}, temperature=0.5, seed=1).choose(LOGITS)
    expected = torch.log_softmax(LOGITS, dim=-1)
    assert event.token_id == 2
    assert event.logprob == float(expected[2])
    assert [token for token, _ in event.top_logprobs] == [1, 3]
    assert event.top_logprobs[0][1] == float(expected[1])
    assert sampler(top_logprobs=0).choose(LOGITS).top_logprobs == ()
    assert sampler().choose(LOGITS).logprob is None


def test_logits_that_are_not_numbers_are_an_error():
    for bad in (torch.full((4,), math.nan), torch.full((4,), -math.inf), torch.tensor([1.0, math.nan, 0.0])):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="not numbers"):
                sampler(temperature=temperature, seed=1).choose(bad)


class Only:
    def __init__(self, *ids):
        self.ids, self.accepted = ids, []

    def allowed_V(self):
        allowed = np.zeros(4, bool)
        allowed[list(self.ids)] = True
        return allowed

    def accept(self, token_id):
        self.accepted.append(token_id)


def test_a_constraint_forbids_all_else_and_ids_beyond_its_array():
    only = Only(0, 2)
    assert sampler(constraint=only).choose(LOGITS).token_id == 2
    assert only.accepted == [2]
    with pytest.raises(ValueError, match="no token is allowed"):
        sampler(constraint=Only()).choose(LOGITS)
    assert sampler(constraint=Only(0)).choose(torch.tensor([0.0, 1.0, 1.0, 1.0, 9.0])).token_id == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"top_k": -2},
        {"seed": -1},
        {"seed": 1 << 64},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": dict.fromkeys(range(2000), 0.0)},
        {"top_logprobs": 21},
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_requests_without_prompt_or_answer_are_refused():
    for options in ({"prompt_ids": (), "max_new_tokens": 1}, {"prompt_ids": (1,), "max_new_tokens": 0}):
        with pytest.raises(ValueError, match=r"prompt|max_new_tokens"):
            GenerationRequest(**options)
    with pytest.raises(ValueError, match="token ids"):
        GenerationRequest(prompt_ids=(-1,), max_new_tokens=1)
