import bz2
import gzip
import json
import lzma
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from experiments.demo.ngram import ngram_bits_per_byte
from experiments.train.corpus import BatchOrder, Corpus, load_corpus, windows
from experiments.train.loop import bits_per_byte

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


# --- files as people have them ---------------------------------------------------------------------------------------


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_blank_and_null_rows_are_skipped_and_counted_by_one_rule(tmp_path):
    rows = [*TEXTS[:30], None, "", "  \n", *TEXTS[30:]]
    (tmp_path / "t.jsonl").write_text("\n" + lines_of(rows) + "\n\n")
    pq.write_table(pa.table({"text": rows}), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        corpus = load_corpus(str(tmp_path / name))
        assert written(corpus) == {text.encode() for text in TEXTS}
        assert corpus.summary == f"1 file, {sum(map(len, TEXTS)):,} bytes, 60 documents; 3 skipped: 2 blank, 1 null"


def test_a_row_without_the_column_is_null_where_the_first_one_has_it(tmp_path):
    (tmp_path / "t.jsonl").write_text(lines_of(TEXTS) + '{"other": 1}\n')
    assert "1 null" in load_corpus(str(tmp_path / "t.jsonl")).summary


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 2: 'text' must be a string or null; got int"),
        ("[1]", "line 2: expected an object with the column 'text'"),
        ("{", "line 2: not JSON"),
    ],
)
def test_lines_that_are_no_text_are_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text(lines_of(TEXTS[:1]) + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "t.jsonl"))


def test_columns_are_refused_by_the_name_of_their_type_and_dictionaries_of_strings_are_read(tmp_path):
    table = pa.table({"text": list(range(60)), "body": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'text' holds int64, not strings; columns of strings: body"):
        load_corpus(str(tmp_path / "t.parquet"))
    assert written(load_corpus(str(tmp_path / "t.parquet"), column="body")) == {text.encode() for text in TEXTS}
    damaged = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(ValueError, match="no readable Parquet file"):
        load_corpus(str(tmp_path / "d.parquet"))


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    "lz4": lambda data: pa.compress(data, "lz4", asbytes=True),
    "two-members.gz": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "no-such-suffix": gzip.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_by_their_first_bytes(tmp_path, suffix):
    text = "".join(TEXTS)
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / f"packed.txt.{suffix}").write_bytes(PACKERS[suffix](text.encode()))
    plain, packed = (load_corpus(str(tmp_path / name)) for name in ("plain.txt", f"packed.txt.{suffix}"))
    assert plain.fingerprint == packed.fingerprint
    if suffix != "no-such-suffix":
        table = tmp_path / f"t.jsonl.{suffix.split('.')[-1]}"
        table.write_bytes(PACKERS[suffix](lines_of(TEXTS).encode()))
        assert written(load_corpus(str(table))) == {text.encode() for text in TEXTS}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04rest", "is a zip archive, not text; unpack it first"),
        (b"%PDF-1.7 rest", "is a PDF"),
        (b"some text\0more", "holds zero bytes"),
        (gzip.compress(b"text " * 1000)[:-20], "damaged gzip file"),
        (lzma.compress(b"text " * 1000)[:-20], "damaged xz file"),
        (pa.compress(b"text " * 1000, "zstd", asbytes=True)[:-6], "damaged zstd file"),
        (b"\xfd7zXZ\0" + b"x" * 50, "damaged xz file"),
    ],
    ids=["zip", "pdf", "zeros", "gzip", "xz", "zstd", "xz-header"],  # bytes of gzip hold the time: no two workers agree
)
def test_what_is_no_text_is_refused_alone_and_counted_in_a_folder(tmp_path, folder, content, reason):
    (folder / "other.dat").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_corpus(str(folder / "other.dat"))
    corpus = load_corpus(str(folder))
    assert written(corpus) == {text.encode() for text in TEXTS}
    assert "2 skipped" in corpus.summary


def test_what_unpacks_to_more_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.train.text.documents.MAX_FILE_BYTES", 1000)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"a" * 2000))
    with pytest.raises(ValueError, match="more than 1000 bytes of text; split the file"):
        load_corpus(str(tmp_path / "t.txt.gz"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read_and_are_no_text(tmp_path, encoding):
    text = "".join(TEXTS) + "größer"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(text, encoding=encoding)
    (tmp_path / "marked.jsonl").write_text(lines_of(TEXTS), encoding=encoding)
    assert load_corpus(str(tmp_path / "plain.txt")).fingerprint == load_corpus(str(tmp_path / "marked.txt")).fingerprint
    assert written(load_corpus(str(tmp_path / "marked.jsonl"))) == {text.encode() for text in TEXTS}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "jsonl.gz"])
def test_shards_in_a_folder_are_one_table(tmp_path, suffix):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        own = TEXTS[number::3]
        if suffix == "parquet":
            pq.write_table(pa.table({"text": own}), shards / f"{number}.{suffix}")
        else:
            packed = gzip.compress if suffix.endswith("gz") else bytes
            (shards / f"{number}.{suffix}").write_bytes(packed(lines_of(own).encode()))
    corpus = load_corpus(str(shards))
    assert written(corpus) == {text.encode() for text in TEXTS}
    assert corpus.summary.startswith("3 files")
    with pytest.raises(ValueError, match="no column 'body'; it has text"):
        load_corpus(str(shards), column="body")


def test_folders_called_test_belong_to_the_users_text(tmp_path):
    for part in ("train", "test", "tests", "site-packages"):
        (tmp_path / "c" / part).mkdir(parents=True)
        (tmp_path / "c" / part / "a.txt").write_text(f"{part} " * 10)
    assert load_corpus(str(tmp_path / "c")).summary == "4 files, 310 bytes, 4 documents"


def test_a_large_file_is_read_in_pieces_and_equals_the_small_reading(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("".join(TEXTS) * 3)
    whole = load_corpus(str(path))
    monkeypatch.setattr("experiments.train.text.documents.PIECE_BYTES", 7)
    assert load_corpus(str(path)).fingerprint == whole.fingerprint
    size = -(-path.stat().st_size // 20)
    text = path.read_bytes()
    assert bytes(whole.train) == b"\0".join(text[start : start + size] for start in range(0, 19 * size, size))


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def byte_pairs(tmp_path):
    """A byte-level BPE tokenizer learned from words; digits it has not seen stay single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["red green blue seven eleven house garden river " * 50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "bpe")
    return str(tmp_path / "bpe")


def test_bits_per_byte_are_those_of_the_held_out_text(tmp_path, byte_pairs):
    random = np.random.default_rng(0)
    prose = " ".join(random.choice(["red", "green", "blue", "seven", "eleven", "house", "garden", "river"], 8_000))
    digits = "".join(random.choice(list("0123456789"), 2_000))
    size = len(prose) // 8
    (tmp_path / "t.jsonl").write_text(lines_of([*(prose[i * size : (i + 1) * size] for i in range(8)), digits]))
    corpus = load_corpus(str(tmp_path / "t.jsonl"), tokenizer=byte_pairs)
    assert len(corpus.held_out) == len(digits)
    assert corpus.tokens_per_byte < 0.4
    rows = corpus.held_out[:1000].reshape(10, 100)
    for scored in (None, rows):
        assert bits_per_byte(np.log(10), corpus, scored) == pytest.approx(np.log2(10))


def test_scored_rows_count_their_own_bytes_only(tmp_path):
    corpus = Corpus(
        train=np.zeros(9, np.uint8),
        held_out=np.arange(6),
        vocab_size=6,
        tokens_per_byte=0.1,
        source="",
        held_out_bytes=np.array([50, 1, 3, 70, 2, 2], np.float32),
    )
    rows = corpus.held_out.reshape(2, 3)  # predicted are tokens 1, 2, 4, 5: 8 bytes
    assert bits_per_byte(np.log(2), corpus, rows) == pytest.approx(4 / 8)
    assert bits_per_byte(np.log(2), corpus) == pytest.approx(6 / 128)


@pytest.mark.parametrize("piece", [1 << 20, 40])
def test_bytes_of_tokens_add_up_to_the_text_and_no_character_is_cut(tmp_path, byte_pairs, monkeypatch, piece):
    monkeypatch.setattr("experiments.train.text.tokens.PIECE_CHARACTERS", piece)
    text = "red grün blue 日本語 🎉 house\n" * 40
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "t.txt"), tokenizer=byte_pairs)
    tokenizer = AutoTokenizer.from_pretrained(byte_pairs)
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.held_out) == text
    held_out = len(tokenizer.decode(corpus.held_out).encode())
    assert corpus.held_out_bytes.sum() == held_out
    assert len(corpus.train) / corpus.tokens_per_byte == pytest.approx(len(text.encode()) - held_out)


def test_ids_with_holes_and_end_tokens_reach_the_model(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "hole", {"[UNK]": 0, "[END]": 1, "red": 2, "blue": 40}, eos_token="[END]")
    (tmp_path / "t.jsonl").write_text(lines_of(["red blue " * 20] * 5))
    corpus = load_corpus(str(tmp_path / "t.jsonl"), tokenizer=tokenizer)
    assert corpus.model_settings == {"vocab_size": 41, "eos_token_id": 1, "pad_token_id": None}
    assert corpus.train.max() == 40
    assert (corpus.train == 1).sum() == 4
    assert corpus.held_out_bytes[-1] == 0


def word_tokenizer(folder, vocabulary, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_is_a_folder_or_its_file(tmp_path, byte_pairs):
    (tmp_path / "t.txt").write_text("red green blue " * 100)
    by_folder, by_file = (
        load_corpus(str(tmp_path / "t.txt"), tokenizer=path) for path in (byte_pairs, f"{byte_pairs}/tokenizer.json")
    )
    assert by_folder.fingerprint == by_file.fingerprint
    with pytest.raises(ValueError, match="no such tokenizer; give a folder"):
        load_corpus(str(tmp_path / "t.txt"), tokenizer=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no tokenizer that transformers reads"):
        load_corpus(str(tmp_path / "t.txt"), tokenizer=str(tmp_path / "t.txt"))
