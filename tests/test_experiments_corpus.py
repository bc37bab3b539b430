import json
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.demo.ngram import ngram_bits_per_byte
from experiments.train.corpus import BatchOrder, load_corpus, windows

TEXTS = [f"document number {number} says hello\n" for number in range(60)]


@pytest.fixture
def folder(tmp_path):
    tmp_path = tmp_path / "texts"
    tmp_path.mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01")
    return tmp_path


def written(corpus):
    return set(bytes(corpus.train).split(b"\0")) | set(bytes(corpus.held_out).split(b"\0"))


def test_a_folder_is_split_by_file_and_nothing_is_lost(folder):
    corpus = load_corpus(str(folder))
    assert written(corpus) == {text.encode() for text in TEXTS}
    assert set(bytes(corpus.held_out).split(b"\0")).isdisjoint(bytes(corpus.train).split(b"\0"))


def test_tables_are_read_by_column(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "t.parquet")
    jsonl = load_corpus(str(tmp_path / "t.jsonl"), column="body")
    parquet = load_corpus(str(tmp_path / "t.parquet"), column="body")
    assert written(jsonl) == {text.encode() for text in TEXTS}
    np.testing.assert_array_equal(jsonl.train, parquet.train)
    np.testing.assert_array_equal(jsonl.held_out, parquet.held_out)
    with pytest.raises(ValueError, match="no column 'text'"):
        load_corpus(str(tmp_path / "t.parquet"))
    with pytest.raises(ValueError, match="line 1"):
        load_corpus(str(tmp_path / "t.jsonl"))


def test_a_single_file_holds_its_end_out(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    corpus = load_corpus(str(tmp_path / "t.txt"))
    assert bytes(corpus.held_out) == b"fghij"


def test_the_standard_library_is_always_there():
    corpus = load_corpus(None)
    assert len(corpus.train) > 5_000_000
    assert len(corpus.held_out) > 100_000


def test_a_tokenizer_by_path(tmp_path, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["document", "number", "says", "hello", *map(str, range(60)), "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    corpus = load_corpus(str(folder), tokenizer=str(tmp_path / "tokenizer"))
    assert corpus.vocab_size == len(words)
    assert corpus.train[:2].tolist() == [0, 1]
    num_bytes = sum(map(len, TEXTS))
    assert corpus.tokens_per_byte == len(corpus.train) / (num_bytes - corpus.held_out_bytes.sum())


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_corpus(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="too few"):
        load_corpus(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="fewer than one sequence"):
        windows(np.zeros(3, np.uint8), 4)


def test_every_epoch_visits_every_window_once_and_batches_can_be_asked_for_in_any_order():
    order = BatchOrder(np.arange(10)[:, None], batch_size=4, seed=1)
    drawn = [order.batch(index)[:, 0].tolist() for index in range(5)]
    flat = list(chain.from_iterable(drawn))
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert order.batch(2)[:, 0].tolist() == drawn[2]


def test_a_bigram_model_by_hand():
    # after "a" came "b" twice; Witten-Bell: P(b|a) = (2 + 1 * P(b)) / 3, P(b) = (2 + 2/256) / (5 + 2), of bytes ababa
    train = np.frombuffer(b"ababa", np.uint8)
    probability_b = (2 + 2 / 256) / 7
    expected = -np.log2((2 + probability_b) / 3)
    assert ngram_bits_per_byte(train, np.frombuffer(b"ab", np.uint8), 2) == pytest.approx(expected)


def test_higher_orders_win_on_regular_text_and_bad_orders_are_refused():
    text = np.frombuffer(b"the cat sat on the mat and the rat sat on the cat. " * 50, np.uint8)
    bits = [ngram_bits_per_byte(text, text[:500], order) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]
    with pytest.raises(ValueError, match="order"):
        ngram_bits_per_byte(text, text, 4)
