"""Kept prefixes: a prompt that begins like an earlier one starts there, with the answer of a cold start."""

import pytest
from transformers import GptOssConfig

from offload.engine.kept.cached import CachedTokens
from offload.engine.kept.prefixes import Prefixes
from offload.engine.options import EngineOptions
from offload.engine.request import Sampling
from tests.served import SIZES, ask, collect, ids_of, serve, write_model

LOGPROBS = Sampling(top_logprobs=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    sizes = {name: value for name, value in SIZES.items() if name not in ("moe_intermediate_size", "num_experts")}
    config = GptOssConfig(**sizes, num_local_experts=4, sliding_window=16)
    return write_model(tmp_path_factory.mktemp("sliding"), config=config)


ANY = EngineOptions(reuse="any")


def converse(engine, prompt, turns, owner=""):
    """A conversation: each turn is all before it and four new tokens; answers and cached tokens."""
    found, cached = [], []
    for turn in range(turns):
        tokens, finished = collect(engine.submit(ask(prompt, 8, ignore_end=True, owner=owner)))
        found.append(ids_of(tokens))
        cached.append(finished.usage.cached_tokens)
        prompt = [*prompt, *found[-1], *range(10 + turn, 14 + turn)]
    return found, cached


@pytest.mark.parametrize("which", ["folder", "sliding"])
def test_a_second_turn_reads_its_new_tokens_only_and_answers_as_a_cold_start(request, which):
    folder = request.getfixturevalue(which)
    prompt = list(range(2, 60))
    with serve(folder, options=ANY) as engine:
        answers, cached = converse(engine, prompt, 3)
        counters = engine.counters()
    # the last token of an answer was never read
    assert cached == [0, len(prompt) + 7, len(prompt) + 7 + 12]
    assert counters.cached_tokens_total == sum(cached)
    assert counters.kv_kept > 0
    with serve(folder, options=EngineOptions(reuse="off")) as engine:
        assert converse(engine, prompt, 3) == (answers, [0, 0, 0])


def test_an_edited_history_falls_back_to_what_is_common(folder):
    prompt = list(range(2, 60))
    with serve(folder, options=ANY) as engine:
        converse(engine, prompt, 1)
        tokens, finished = collect(engine.submit(ask([*prompt[:30], 5, *prompt[31:]], 8, ignore_end=True)))
        assert finished.usage.cached_tokens == 30
    with serve(folder, options=EngineOptions(reuse="off")) as engine:
        assert ids_of(collect(engine.submit(ask([*prompt[:30], 5, *prompt[31:]], 8, ignore_end=True)))[0]) == ids_of(
            tokens
        )


def test_a_sliding_window_goes_back_to_snapshots_only(sliding):
    prompt = list(range(2, 60))
    with serve(sliding, options=ANY) as engine:
        converse(engine, prompt, 1)
        # 40 tokens are common, the window has forgotten them, and no snapshot lies before the end of the prompt
        assert collect(engine.submit(ask([*prompt[:40], 5], 8)))[1].usage.cached_tokens == 0
        # the end of the prompt has one
        assert collect(engine.submit(ask([*prompt, 90, 91, 92], 8)))[1].usage.cached_tokens == len(prompt)


def test_kept_prefixes_belong_to_their_owner(folder):
    prompt = list(range(2, 60))
    with serve(folder, options=ANY) as engine:
        assert converse(engine, prompt, 1, owner="one")[1] == [0]
        assert converse(engine, prompt, 1, owner="other")[1] == [0]
        assert converse(engine, prompt, 1, owner="one")[1] == [len(prompt) - 1]


def test_several_answers_to_one_prompt_share_its_prefill(folder):
    prompt = list(range(2, 60))
    requests = [
        ask(prompt, 8, ignore_end=True, sampling=Sampling(temperature=1.0, seed=seed, top_logprobs=3))
        for seed in range(3)
    ]
    with serve(folder) as engine:
        streams = [engine.submit(request) for request in requests]
        answers = [collect(stream) for stream in streams]
        assert sorted(finished.usage.cached_tokens for _, finished in answers) == [0, len(prompt), len(prompt)]
    for request, (tokens, _) in zip(requests, answers, strict=True):
        with serve(folder) as engine:
            assert collect(engine.submit(request))[0] == tokens  # bits: the log-probabilities as well


def test_whole_pieces_that_are_reused_have_the_bits_of_a_cold_start(folder):
    """`aligned`, in pieces of 16 tokens: the rest of the prompt is read in the same shapes."""
    prompt = list(range(2, 60))
    longer = [*prompt[:50], *range(40, 70)]
    answers = []
    for warm in (True, False):
        with serve(folder, options=EngineOptions(reuse="aligned", piece_tokens=16)) as engine:
            if warm:
                collect(engine.submit(ask(prompt, 8, sampling=LOGPROBS)))
            tokens, finished = collect(engine.submit(ask(longer, 8, sampling=LOGPROBS)))
            assert finished.usage.cached_tokens == (48 if warm else 0)
            answers.append(tokens)
    assert answers[0] == answers[1]


def test_kept_prefixes_give_way_to_requests(folder):
    with serve(folder, options=ANY, context=128) as engine:
        for first in range(2, 12):
            prompt = [first, *range(20, 70)]
            finished = collect(engine.submit(ask(prompt, 8, ignore_end=True, owner=str(first))))[1]
            assert finished.reason == "length"
            counters = engine.counters()
            assert 0 < counters.kv_kept <= counters.kv_capacity
            assert counters.kv_reserved == counters.kv_in_use == 0
        # all of the pool for one request
        assert collect(engine.submit(ask(range(2, 90), 40, ignore_end=True)))[1].reason == "length"


class Layerless:
    """A cache without layers: only token ids count."""

    layers = ()


def kept(*token_ids):
    return CachedTokens(Layerless(), token_ids)


def test_what_continues_a_kept_prefix_replaces_it_and_the_oldest_goes_first():
    prefixes = Prefixes(1)
    first, other = kept(*range(20)), kept(*range(50, 70))
    prefixes.keep("", first)
    prefixes.keep("", other)
    longer = kept(*range(30))
    prefixes.keep("", longer)
    assert prefixes.of("") == [other, longer]
    prefixes.use(other)
    assert prefixes.of("") == [longer, other]
    assert prefixes.drop_oldest()
    assert prefixes.of("") == [other]
    prefixes.keep("", kept(1, 2, 3))
    assert prefixes.of("") == [other]  # too short to keep


@pytest.mark.parametrize(("one", "other"), [(range(20), range(20)), (range(20), range(7)), ([1, 2, 3], [1, 2, 4])])
def test_the_common_prefix_is_that_of_a_loop(one, other):
    one, other = list(one), list(other)
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert kept(*one).common(other) == expected


@pytest.fixture
def folder_options(tmp_path):
    return EngineOptions(reuse="any", prefix_folder=tmp_path / "prefixes")


def test_prefixes_survive_a_restart_and_answer_as_a_cold_start(request, folder_options):
    for which in ("folder", "sliding"):
        folder = request.getfixturevalue(which)
        prompt = list(range(2, 80))
        with serve(folder, options=folder_options) as engine:
            first, _ = collect(engine.submit(ask(prompt, 8, ignore_end=True, owner="key")))
        longer = [*prompt, *ids_of(first), 5, 6, 7]
        with serve(folder, options=folder_options) as engine:
            tokens, finished = collect(engine.submit(ask(longer, 8, ignore_end=True, owner="key")))
            assert finished.usage.cached_tokens == len(prompt) + 7
            assert collect(engine.submit(ask(longer, 8, owner="other")))[1].usage.cached_tokens == 0
        with serve(folder, options=EngineOptions(reuse="off")) as engine:
            assert ids_of(collect(engine.submit(ask(longer, 8, ignore_end=True)))[0]) == ids_of(tokens)


def kept_files(options):
    return sorted(options.prefix_folder.glob("*"))


def test_a_longer_turn_replaces_its_file_and_only_its_owner_can_read_the_folder(folder, folder_options):
    with serve(folder, options=folder_options, context=512) as engine:
        converse(engine, list(range(2, 80)), 3, owner="a secret key")
    assert len(kept_files(folder_options)) == 1
    assert kept_files(folder_options)[0].read_bytes().count(b"a secret key") == 0
    assert folder_options.prefix_folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["a byte", "the end", "the header", "all"])
def test_a_damaged_file_is_left_out_with_a_line(folder, folder_options, damage, logged):
    prompt = list(range(2, 80))
    with serve(folder, options=folder_options) as engine:
        first = ids_of(collect(engine.submit(ask(prompt, 8, ignore_end=True)))[0])
    (file,) = kept_files(folder_options)
    data = bytearray(file.read_bytes())
    if damage == "a byte":
        data[-100] ^= 1
    elif damage == "the end":
        data = data[:-50]
    elif damage == "the header":
        data[:8] = (1 << 60).to_bytes(8, "little")
    else:
        data = bytearray(b"x" * 100)
    file.write_bytes(data)
    with serve(folder, options=folder_options) as engine:
        tokens, finished = collect(engine.submit(ask(prompt, 8, ignore_end=True)))
        assert finished.usage.cached_tokens == 0
        assert ids_of(tokens) == first
    assert any("kept prefix left out" in record.getMessage() for record in logged)


def test_files_of_another_model_are_not_used(folder, sliding, folder_options):
    prompt = list(range(2, 80))
    for which in (folder, sliding):
        with serve(which, options=folder_options) as engine:
            assert collect(engine.submit(ask(prompt, 8, ignore_end=True)))[1].usage.cached_tokens == 0
    assert len(kept_files(folder_options)) == 2


def test_the_folder_does_not_grow_beyond_its_bytes(folder, tmp_path):
    options = EngineOptions(reuse="any", prefix_folder=tmp_path / "kept", prefix_disk="200KiB")
    with serve(folder, options=options) as engine:
        for first in range(2, 10):
            collect(engine.submit(ask([first, *range(10, 90)], 4, ignore_end=True)))
    files = kept_files(options)
    assert files
    assert sum(file.stat().st_size for file in files) <= 200 << 10


def test_a_folder_that_cannot_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot keep prefixes"):
        serve(folder, options=EngineOptions(prefix_folder=tmp_path / "file"))
