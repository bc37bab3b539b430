"""Packed steps: rows of several sequences in one call, each with the logits that it has alone."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from offload.engine.options import EngineOptions
from offload.engine.packing import Piece
from offload.engine.request import Sampling
from offload.engine.step import ModelSteps
from tests.served import ask, collect, ids_of, prompts, serve, write_model
from tests.test_offload_runtime_families import _small_config

PACKED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "glm4_moe", "cohere2_moe")
STATEFUL = ("qwen3_next", "nemotron_h", "deepseek_v32")
IN_TURNS_WITH_STATES = ("qwen3_next", "gpt_oss")


def small(model_type):
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = _small_config(model_type, {"num_hidden_layers": 4})
    return AutoModelForCausalLM.from_config(config).float().eval()


def read(steps, prompt):
    cached = steps.empty()
    steps.run([Piece(cached=cached, token_ids=prompt)])
    return cached


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", PACKED)
@pytest.mark.filterwarnings("ignore")
def test_rows_that_decode_together_beside_a_piece_of_a_prompt_have_the_logits_of_each_alone(model_type):
    steps = ModelSteps(small(model_type))
    assert steps.can_pack
    # longer and shorter than the sliding window of 16
    several = [[int(token) for token in torch.arange(3, 3 + length) % 90] for length in (4, 15, 16, 37)]
    new = [[50], [51], [52, 53, 54, 55, 56], [57]]
    alone = [
        steps.run([Piece(cached=read(steps, prompt), token_ids=ids)])[0]
        for prompt, ids in zip(several, new, strict=True)
    ]
    caches = [read(steps, prompt) for prompt in several]
    together = steps.run([Piece(cached=cached, token_ids=ids) for cached, ids in zip(caches, new, strict=True)])
    for found, expected, cached, prompt, ids in zip(together, alone, caches, several, new, strict=True):
        assert_same(found, expected)
        assert cached.token_ids == prompt + ids
    # the caches are right as well: each goes on alone
    for cached, prompt, ids in zip(caches, several, new, strict=True):
        found = steps.run([Piece(cached=cached, token_ids=[60])])[0]
        assert_same(found, steps.run([Piece(cached=read(steps, prompt + ids), token_ids=[60])])[0])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore")
def test_tokens_row_by_row_have_the_logits_of_single_steps_and_can_be_taken_back(model_type):
    steps = ModelSteps(small(model_type))
    assert steps.can_pack
    for length in (5, 14, 40):
        prompt = [int(token) for token in torch.arange(3, 3 + length) % 90]
        cached, single = read(steps, prompt), read(steps, prompt)
        cached.begin_trial()
        ids = [41, 42, 43, 44]
        found = steps.run([Piece(cached=cached, token_ids=ids, num_logits=4, by_row=True)])[0]
        expected = torch.cat([steps.run([Piece(cached=single, token_ids=[token])])[0] for token in ids])
        assert_same(found, expected)
        cached.end_trial(2)
        assert cached.token_ids == [*prompt, 41, 42]
        found = steps.run([Piece(cached=cached, token_ids=[70])])[0]
        assert_same(found, steps.run([Piece(cached=read(steps, [*prompt, 41, 42]), token_ids=[70])])[0])


@pytest.mark.parametrize("model_type", STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_families_with_states_or_indices_of_their_own_are_not_packed(model_type):
    assert not ModelSteps(small(model_type)).can_pack


@pytest.mark.filterwarnings("ignore")
def test_a_family_with_a_cache_of_its_own_is_refused():
    with pytest.raises(ValueError, match="cache of its own"):
        ModelSteps(small("minimax"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", *IN_TURNS_WITH_STATES])
@pytest.mark.filterwarnings("ignore")
def test_a_fork_goes_on_with_the_same_bits_and_leaves_its_origin_alone(model_type):
    steps = ModelSteps(small(model_type))
    prompt = list(range(3, 40))
    origin = steps.empty()
    steps.run([Piece(cached=origin, token_ids=prompt[:20])])
    origin.take_snapshot()
    steps.run([Piece(cached=origin, token_ids=prompt[20:])])
    assert origin.reachable(len(origin)) == len(origin)
    assert origin.reachable(25) in (20, 25)
    expected = steps.run([Piece(cached=read_in_two(steps, prompt), token_ids=[60])])[0]
    for length in (20, len(prompt)):
        fork = origin.fork(length)
        if length == 20:
            steps.run([Piece(cached=fork, token_ids=prompt[20:])])
        assert torch.equal(steps.run([Piece(cached=fork, token_ids=[60])])[0], expected)
    assert torch.equal(steps.run([Piece(cached=origin, token_ids=[60])])[0], expected)


def read_in_two(steps, prompt):
    cached = steps.empty()
    steps.run([Piece(cached=cached, token_ids=prompt[:20])])
    steps.run([Piece(cached=cached, token_ids=prompt[20:])])
    return cached


def test_users_together_have_the_tokens_of_each_alone(tmp_path):
    """Float32 with random weights: the last bits differ, the largest logit does not."""
    folder = write_model(tmp_path)
    requests = [ask(prompt, 12, ignore_end=True) for prompt in prompts(5, seed=4)]
    with serve(folder) as engine:
        expected = [ids_of(collect(engine.submit(request))[0]) for request in requests]
    with serve(folder, options=EngineOptions(schedule="together", reuse="off")) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [ids_of(collect(stream)[0]) for stream in streams] == expected
        counters = engine.counters()
        assert counters.can_pack
        assert counters.rows_total >= 5 * 11 - 4 * 12
        assert counters.steps_total < 5 * 12  # fewer calls of the model than tokens


@pytest.mark.parametrize("users", [2, 4, 8])
def test_users_together_have_the_bits_of_each_alone_where_rows_are_independent(tmp_path, users):
    folder = write_model(tmp_path, torch.bfloat16)
    sampling = Sampling(top_logprobs=20)
    requests = [ask(prompt, 12, ignore_end=True, sampling=sampling) for prompt in prompts(users, seed=4)]
    answers = []
    for schedule in ("turns", "together"):
        with serve(folder, options=EngineOptions(schedule=schedule), arithmetic="fixed") as engine:
            streams = [engine.submit(request) for request in requests]
            answers.append([collect(stream)[0] for stream in streams])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("schedule", [pytest.param("turns", marks=pytest.mark.slow), "together"])
def test_whole_pieces_that_users_share_leave_each_the_bits_of_a_cold_start_alone(tmp_path, schedule):
    """One beginning for all, read by whoever comes first: it must not matter who that was."""
    folder = write_model(tmp_path, torch.bfloat16)
    begin, rest = [*range(10, 66)], prompts(4, seed=7)
    sampling = Sampling(top_logprobs=20)
    requests = [ask([*begin, *own], 10, ignore_end=True, sampling=sampling) for own in rest]
    alone = {"schedule": "turns", "lookup": "off", "piece_tokens": 16}
    expected = []
    with serve(folder, options=EngineOptions(reuse="off", **alone), arithmetic="fixed") as engine:
        for request in requests:
            expected.append(collect(engine.submit(request))[0])
    shared = EngineOptions(reuse="aligned", schedule=schedule, piece_tokens=16)
    with serve(folder, options=shared, arithmetic="fixed") as engine:
        answers = [collect(stream) for stream in [engine.submit(request) for request in requests]]
    assert [tokens for tokens, _ in answers] == expected
    assert sorted(finished.usage.cached_tokens for _, finished in answers)[1] >= 16
