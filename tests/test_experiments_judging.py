"""What a difference is worth, by hand and by SciPy's own tests; tasks that oracles solve; domains of a folder."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.compare.judged import Judging, stated_margin
from experiments.compare.summary import METRICS, summarise
from experiments.judging.domains import bits_by_domain, domain_corpora
from experiments.judging.equivalence import effect_size, equivalence, share_interval
from experiments.judging.tasks import CHOICES, CONTINUATION, SHARED, _cloze_items, cloze, copying
from experiments.train.corpus import Corpus, load_corpus
from experiments.train.torch_run import build, evaluate
from moe import save_byte_tokenizer

GAPS = [0.012, -0.004, 0.009, 0.003, -0.001]


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02])
def test_equivalence_is_two_one_sided_tests(margin):
    found = equivalence(GAPS, margin)
    above = stats.ttest_1samp(GAPS, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(GAPS, margin, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(above, below))
    assert found.is_shown == (-margin < found.low and found.high < margin)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 4, loc=np.mean(GAPS), scale=stats.sem(GAPS)))


def test_equivalence_of_no_spread_of_one_pair_and_of_no_margin():
    assert equivalence([0.01, 0.01], 0.02).is_shown
    assert not equivalence([0.03, 0.03], 0.02).is_shown
    assert equivalence([0.01], 0.02) is None
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive number of bits per byte"):
            equivalence(GAPS, margin)


def test_an_effect_size_by_hand_and_its_interval_by_the_noncentral_t():
    found = effect_size([1.0, 2.0, 3.0])
    assert found.value == pytest.approx(2.0 * (1 - 3 / 7))  # mean 2, deviation 1, two degrees of freedom
    for end, share in ((found.low, 0.975), (found.high, 0.025)):
        shift = end / (1 - 3 / 7) * math.sqrt(3)
        assert stats.nct.cdf(2 * math.sqrt(3), 2, shift) == pytest.approx(share, abs=1e-6)
    assert effect_size([1.0]) is None
    assert effect_size([1.0, 1.0]) is None


def test_wilsons_interval():
    assert share_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_a_row_says_equivalent_only_where_a_margin_was_stated():
    def runs(variant, values):
        return [
            {"variant": variant, "seed": seed, "status": "finished", **dict.fromkeys(METRICS, value)}
            for seed, value in enumerate(values)
        ]

    results = [*runs("a", [2.0] * 5), *runs("b", [2.0 + gap for gap in GAPS])]
    assert summarise(results)[1]["difference"]["verdict"] == "no difference shown"
    found = summarise(results, margin=0.02)[1]["difference"]
    assert found["verdict"] == "equivalent"
    assert found["equivalence"]["margin"] == 0.02
    assert found["effect"]["value"] == pytest.approx(effect_size(GAPS).value)
    close = [*runs("a", [2.0] * 5), *runs("b", [2.005, 2.0051, 2.0049, 2.005, 2.0052])]
    assert summarise(close, margin=0.02)[1]["difference"]["verdict"] == "worse, within the margin"


def test_a_margin_is_stated_before_the_runs_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    assert stated_margin(out, None) is None
    assert stated_margin(out, 0.01) == 0.01
    assert stated_margin(out, None) == 0.01
    assert stated_margin(out, 0.02) == 0.02, "no run has ended yet"
    (out / "runs/a/seed_0").mkdir(parents=True)
    (out / "runs/a/seed_0/compare_result.json").write_text("{}")
    assert stated_margin(out, 0.02) == 0.02
    with pytest.raises(ValueError, match=r"had ended under the margin 0\.02"):
        stated_margin(out, 0.03)
    with pytest.raises(ValueError, match="positive number"):
        stated_margin(tmp_path / "new", -1.0)


def test_variants_that_share_a_rate_and_few_seeds_are_warned_of():
    run = [
        SimpleNamespace(variant=variant, config=SimpleNamespace(learning_rate=3e-3, seed=seed))
        for variant in "ab"
        for seed in range(2)
    ]
    shared, seeds = Judging(margin=None, is_tuned=False).warnings(run)
    assert "share one learning rate (0.003)" in shared
    assert "2 seeds per variant" in seeds
    assert Judging(margin=None, is_tuned=True).warnings(run) == [seeds]
    assert Judging(margin=None, is_tuned=False).warnings(run[:1]) == []


class Oracle:
    """A model whose next token after a position is what `answer` says of the tokens up to there."""

    device = torch.device("cpu")

    def __init__(self, answer, vocab_size=256):
        self.answer, self.vocab_size = answer, vocab_size

    def __call__(self, token_BS, **_):
        logits = torch.zeros(*token_BS.shape, self.vocab_size)
        for row, tokens in enumerate(token_BS.tolist()):
            for place in range(len(tokens)):
                found = self.answer(tokens[: place + 1])
                if found is not None:
                    logits[row, place, found] = 5.0
        return SimpleNamespace(logits=logits)


def text_corpus(text):
    stream = np.frombuffer(text.encode(), np.uint8)
    return Corpus(train=stream, held_out=stream, vocab_size=256, tokens_per_byte=1.0, source="text")


CORPUS = text_corpus("".join(f"the {n * n % 97} and the {n * 31 % 89} of {n}; " for n in range(300)))


def test_whoever_knows_the_text_chooses_right_and_whoever_knows_nothing_never():
    stream = CORPUS.held_out.tobytes()

    def remembers(tokens):
        place = stream.find(bytes(tokens[-24:]))
        return None if place < 0 or place + len(tokens[-24:]) >= len(stream) else stream[place + len(tokens[-24:])]

    found = cloze(Oracle(remembers), CORPUS, sequence_length=40, num_items=12)
    assert (found.hits, found.trials, found.chance) == (12, 12, 0.25)
    assert cloze(Oracle(lambda _: None), CORPUS, sequence_length=40, num_items=12).hits == 0


def test_the_continuations_of_an_item_differ_and_follow_the_same_tokens():
    stream = np.asarray(CORPUS.held_out, np.int64)
    items = _cloze_items(stream, 20, 0, 8)
    assert len(items) == 8
    for item in items:
        assert item.shape == (CHOICES, 20 + CONTINUATION)
        assert (item[:, :20] == item[0, :20]).all()
        assert len({row.tobytes() for row in item[:, 20:]}) == CHOICES
        for row in item[1:]:
            wanted = np.concatenate([item[0, 20 - SHARED : 20], row[20:]]).astype(np.uint8).tobytes()
            assert wanted in CORPUS.held_out.tobytes()
    assert [item.tobytes() for item in items] == [item.tobytes() for item in _cloze_items(stream, 20, 0, 8)]
    assert items[0].tobytes() != _cloze_items(stream, 20, 1, 8)[0].tobytes()


def test_whoever_looks_back_copies():
    def copies(tokens):
        place = bytes(tokens).rfind(bytes(tokens[-4:]), 0, len(tokens) - 1)
        return None if place < 0 or len(tokens) < 5 else tokens[place + 4]

    found = copying(Oracle(copies), CORPUS, sequence_length=40, num_items=8)
    assert found.share > 0.9
    assert found.chance < found.share - 0.2
    blind = copying(Oracle(lambda _: 32), CORPUS, sequence_length=40, num_items=8)
    assert blind.share == pytest.approx(blind.chance)


def test_too_little_text_makes_no_task():
    short = text_corpus("too short")
    assert cloze(Oracle(lambda _: None), short, sequence_length=40) is None
    assert copying(Oracle(lambda _: None), short, sequence_length=40) is None


@pytest.fixture
def folder(tmp_path):
    for domain, word in (("code", "def f(x): return x\n"), ("prose", "It was a dark and stormy night. ")):
        for number in range(30):
            (tmp_path / "texts" / domain / "deeper").mkdir(parents=True, exist_ok=True)
            (tmp_path / "texts" / domain / "deeper" / f"{number}.txt").write_text(f"{number} {word}" * 5)
    (tmp_path / "texts" / "readme.txt").write_text("in no domain\n" * 9)
    return tmp_path / "texts"


def test_the_folders_of_a_text_are_its_domains(folder, tmp_path, tiny_training):
    corpus = load_corpus(str(folder))
    found = domain_corpora(corpus)
    assert list(found) == ["code", "prose"]
    assert b"def f" in found["code"].held_out.tobytes()
    assert b"stormy" not in found["code"].held_out.tobytes()
    assert b"def f" not in found["prose"].held_out.tobytes()
    config = tiny_training.__class__(**{**vars(tiny_training), "model": {**tiny_training.model, "vocab_size": 256}})
    model, *_ = build(config, corpus, torch.device("cpu"))
    bits = bits_by_domain(model, corpus, config)
    assert bits["prose"] == evaluate(model, found["prose"], config)
    assert bits["code"] != bits["prose"]

    save_byte_tokenizer(tmp_path)
    as_tokens = domain_corpora(load_corpus(str(folder), tokenizer=str(tmp_path)))
    assert {name: own.held_out_bytes.sum() for name, own in as_tokens.items()} == {
        name: len(own.held_out.tobytes().replace(b"\0", b"")) for name, own in found.items()
    }
    for path in {*folder.rglob("*1*.txt"), *folder.rglob("*2*.txt")}:
        path.unlink()
    few = domain_corpora(load_corpus(str(folder)))
    assert list(few) == ["code", "prose"], "each domain has one document held out, however few there are"
    assert load_corpus(str(folder / "readme.txt")).held_out_domains == ()
    assert load_corpus(str(folder / "code" / "deeper")).held_out_domains == ()


@pytest.mark.parametrize("counts", [(1, 5), (2, 2), (40, 3), (3, 40), (30, 1), (25, 25)])
def test_every_domain_of_two_documents_has_one_held_out_and_one_to_train_on(counts, tmp_path):
    for domain, count in zip("ab", counts, strict=True):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "texts" / domain / f"{number:03}").write_text(f"{domain} {number};")
    corpus = load_corpus(str(tmp_path / "texts"))
    train, held_out = (stream.tobytes().decode() for stream in (corpus.train, corpus.held_out))
    for domain, count in zip("ab", counts, strict=True):
        assert f"{domain} " in train or count == 1
        assert (domain in {name for name, _, _ in corpus.held_out_domains}) == (f"{domain} " in held_out)
        assert f"{domain} " in held_out or count == 1
    assert sorted((train + "\0" + held_out).split("\0")) == sorted(
        f"{domain} {number};" for domain, count in zip("ab", counts, strict=True) for number in range(count)
    )
