"""Who of those who wait starts next, where experts are foreseen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import offload
from moe import MoEForCausalLM
from offload.engine.planning.likeness import MOST_OVERTAKEN, LikeFirst

EXPERTS = 8


def uses(prompt_ids):
    """A prompt's tokens are the experts that it uses."""
    return np.isin(np.arange(EXPERTS), prompt_ids)


def request(key, *experts):
    return SimpleNamespace(key=key, request=SimpleNamespace(prompt_ids=experts))


def keys(sequences):
    return [sequence.key for sequence in sequences]


def test_who_adds_the_fewest_experts_is_next_and_equals_keep_their_order():
    order = LikeFirst(uses)
    running = [request(0, 1, 2), request(1, 2, 3)]
    waiting = [request(2, 5, 6), request(3, 1, 5), request(4, 3, 6), request(5, 1, 2, 3)]
    assert keys(order.order(waiting, running)) == [5, 3, 4, 2]
    assert keys(order.order(waiting, [])) == [2, 3, 4, 5], "nothing runs: who came first"


def test_at_most_four_overtake_one():
    order = LikeFirst(uses)
    running, first = [request(0, 1)], request(1, 7)
    for key in range(2, 2 + MOST_OVERTAKEN):
        waiting = [first, request(key, 1)]
        chosen = order.order(waiting, running)[0]
        assert chosen.key == key
        assert order.note_start(chosen, waiting) == 1
    waiting = [first, request(9, 1)]
    assert keys(order.order(waiting, running)) == [1, 9]
    assert order.note_start(first, waiting) == 0


def test_a_prompt_is_foreseen_once_and_forgotten_when_it_is_gone():
    asked = []

    def foresee(prompt_ids):
        asked.append(prompt_ids)
        return uses(prompt_ids)

    order = LikeFirst(foresee)
    running, waiting = [request(0, 1)], [request(1, 2), request(2, 3)]
    for _ in range(3):
        order.order(waiting, running)
    assert sorted(asked) == [(1,), (2,), (3,)]
    order.order(waiting[:1], [])
    order.order(waiting, running)
    assert sorted(asked) == [(1,), (1,), (2,), (3,), (3,)]


@pytest.mark.parametrize("order", ["auto", "arrival"])
def test_an_engine_starts_like_prompts_together_and_changes_no_answer(tiny_config, tmp_path, order):
    """Routers that read token ids foresee exactly; prompts of two kinds come in turn, two run at a time."""
    torch.manual_seed(0)
    router = {"router_width": 16, "router_heads": 2}
    config = tiny_config(architecture="readme", architecture_options=router, num_experts_per_tok=1)
    MoEForCausalLM(config).save_pretrained(tmp_path)
    prompts = [(3, 3, 3), (50, 50, 50)] * 3
    asked = [offload.GenerationRequest(prompt_ids=prompt, max_new_tokens=3) for prompt in prompts]

    def answers(most_users, order):
        options = offload.EngineOptions(most_users=most_users, most_queued=8, order=order, reuse="off")
        model = offload.load(tmp_path, cache_experts=6, arithmetic="fixed")
        with offload.Engine(lambda: model, options) as engine:
            engine.wait_ready()
            streams = [engine.submit(each) for each in asked]
            found = [[event.token_id for event in stream if hasattr(event, "token_id")] for stream in streams]
            return found, engine.counters().overtaken_total

    alone, _ = answers(1, "arrival")
    together, overtaken = answers(2, order)
    assert together == alone
    assert order == "auto" or overtaken == 0
