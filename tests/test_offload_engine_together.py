"""What requests do to each other's time, and never to each other's answers: long prompts, riding along, guesses."""

import pytest
import torch

from offload.engine.options import EngineOptions
from offload.engine.request import Sampling
from tests.served import ask, collect, ids_of, serve, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("together"))


def long_prompt(length=200):
    return [(7 * place) % 90 + 2 for place in range(length)]


def test_an_answer_goes_on_between_the_layers_of_a_long_prompt(folder):
    """Without packed steps: the layers of the prompt wait while an answer gets its share of the time."""
    order = []

    def watch(model):
        def note(module, args):
            order.append(args[0].shape[1])

        for layer in model.model.layers:
            layer.register_forward_pre_hook(note)

    with serve(
        folder, options=EngineOptions(decode_share=0.9, most_new_tokens=400), prepare=watch, context=800
    ) as engine:
        expected = ids_of(collect(engine.submit(ask([5, 6, 7], 150, ignore_end=True)))[0])
        prompt = long_prompt()
        cold = ids_of(collect(engine.submit(ask(prompt, 8, ignore_end=True, owner="a")))[0])
        order.clear()
        stream = engine.submit(ask([5, 6, 7], 150, ignore_end=True, owner="b"))
        stream.next(30)
        other = engine.submit(ask(prompt, 8, ignore_end=True, owner="c"))
        assert ids_of(collect(other)[0]) == cold
        tokens = [expected[0], *ids_of(collect(stream)[0])]
        assert tokens == expected
    # steps of one token between the first and the last layer of the step of 200
    places = [place for place, rows in enumerate(order) if rows == len(prompt)]
    assert len(places) == 3
    assert places[-1] - places[0] > 3


def test_an_answer_rides_along_with_every_piece_of_a_prompt(folder):
    rows = []

    def watch(model):
        model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))

    options = EngineOptions(schedule="together", piece_tokens=32, reuse="off", decode_share=0)
    with serve(folder, options=options, prepare=watch, context=800) as engine:
        expected = ids_of(collect(engine.submit(ask([5, 6, 7], 60, ignore_end=True)))[0])
        prompt = long_prompt()
        cold = ids_of(collect(engine.submit(ask(prompt, 4, ignore_end=True)))[0])
        rows.clear()
        stream = engine.submit(ask([5, 6, 7], 60, ignore_end=True))
        stream.next(30)
        other = engine.submit(ask(prompt, 4, ignore_end=True))
        assert ids_of(collect(other)[0]) == cold
        assert [expected[0], *ids_of(collect(stream)[0])] == expected
    assert rows.count(33) >= 5  # six whole pieces of 32 tokens, each with a token of the answer


def test_a_short_request_is_not_held_up_by_a_long_prompt_of_many_pieces(folder):
    options = EngineOptions(piece_tokens=16, reuse="off")
    with serve(folder, options=options, context=800) as engine:
        long = engine.submit(ask(long_prompt(400), 4, ignore_end=True))
        short = engine.submit(ask([5, 6, 7], 4, ignore_end=True))
        collect(short)
        assert long.finished is None
        assert long.position().state == "prefill"
        assert 0 < long.position().prefilled_tokens < 400
        assert collect(long)[1].reason == "length"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)])
def test_guessed_tokens_change_nothing_but_the_number_of_steps(folder, sampling):
    """Float32 with random weights: rows of a step differ in their last bits from single steps, the tokens do not."""
    prompt = [*range(10, 30)] * 3
    request = ask(prompt, 60, ignore_end=True, sampling=sampling)
    with serve(folder) as engine:
        expected = ids_of(collect(engine.submit(request))[0])
        steps = engine.counters().steps_total
    with serve(folder, options=EngineOptions(lookup="always", reuse="any")) as engine:
        before = engine.counters().steps_total
        tokens, finished = collect(engine.submit(request))
        assert ids_of(tokens) == expected
        assert [event.index for event in tokens] == list(range(60))
        assert finished.usage.completion_tokens == 60
        counters = engine.counters()
        assert counters.proposed_total > 0
        assert counters.accepted_total <= counters.proposed_total
        assert counters.steps_total - before == steps - counters.accepted_total
        # what was guessed wrongly is not among the kept tokens: a second turn answers as a cold one
        longer = ask([*prompt, *expected, 5, 6], 10, ignore_end=True)
        warm, finished = collect(engine.submit(longer))
        assert finished.usage.cached_tokens == len(prompt) + 59
    with serve(folder, options=EngineOptions(reuse="off")) as engine:
        assert ids_of(collect(engine.submit(longer))[0]) == ids_of(warm)


def test_guesses_end_an_answer_where_single_steps_would(folder):
    prompt = [*range(10, 30)] * 3
    with serve(folder) as engine:
        ids = ids_of(collect(engine.submit(ask(prompt, 40, ignore_end=True)))[0])
    for place in range(1, 40):
        if ids[place] in ids[:place]:
            continue
        with serve(folder, options=EngineOptions(lookup="always")) as engine:
            tokens, finished = collect(
                engine.submit(ask(prompt, 40, ignore_end=True, stop_ids=frozenset([ids[place]])))
            )
            assert ids_of(tokens) == ids[: place + 1]
            assert finished.reason == "stop"
            break


def test_level_one_keeps_its_bits_guesses_and_packed_steps_are_off(folder):
    with serve(folder) as engine:
        info = engine.model_info
        assert (info.arithmetic, info.can_pack, info.reuse) == ("exact", False, "aligned")
        streams = [engine.submit(ask([5, 6, 7] * 5, 20, ignore_end=True)) for _ in range(3)]
        for stream in streams:
            collect(stream)
        assert engine.counters().proposed_total == 0
        assert not engine.counters().is_together


def test_free_arithmetic_may_pack_guess_and_reuse_any_prefix(tmp_path):
    folder = write_model(tmp_path, torch.bfloat16)
    with serve(folder, arithmetic="fast") as engine:
        info = engine.model_info
        assert (info.arithmetic, info.can_pack, info.reuse) == ("fast", True, "any")
