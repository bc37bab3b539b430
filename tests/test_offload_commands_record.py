"""Text for `trace record`: read and tokenised piece by piece, the same tokens as at once; what is computed."""

import itertools
import tracemalloc

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

import offload
from moe import ByteText, TokenizerText
from offload.serve import corpus
from offload.serve.corpus import sequences, text_files
from offload.serve.recording import only_last_logits, record_over
from routing.traces import RoutingTrace

STORY = "It was a dark, stormy night; the rain fell in torrents.\n\n  Ünïcödé — except at intervals, ‘naïve’ 東京 🙂.\n"


@pytest.fixture(scope="module")
def worded():
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([STORY] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return TokenizerText(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("piece_bytes", [7, 64, 1000, 1 << 16])
def test_pieces_give_the_tokens_of_the_whole(kind, piece_bytes, worded, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    text = ByteText() if kind == "bytes" else worded
    (tmp_path / "a.txt").write_text(STORY * 20, encoding="utf-8")
    found = list(sequences(tmp_path / "a.txt", text, 50, 10**9))
    assert list(itertools.chain(*found)) == text.encode(STORY * 20)
    assert all(len(piece) == 50 for piece in found[:-1])


def test_sequences_end_with_files_and_with_the_number_of_tokens(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 25)
    (tmp_path / "a.txt").write_text("a" * 25)
    assert [len(piece) for piece in sequences(tmp_path, ByteText(), 10, 45)] == [10, 10, 5, 10, 10]
    assert [len(piece) for piece in sequences(tmp_path, ByteText(), 10, 33)] == [10, 10, 5, 8]
    with pytest.raises(ValueError, match="no such file or folder"):
        text_files(tmp_path / "none")


def test_an_endless_word_is_cut_and_broken_bytes_are_shown_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"x" * 20_000 + b"\xff\xc3")
    whole = list(itertools.chain(*sequences(tmp_path / "a.txt", ByteText(), 512, 10**9)))
    assert bytes(whole) == b"x" * 20_000 + "\ufffd\ufffd".encode()


def test_memory_does_not_depend_on_the_size_of_the_text(worded, tmp_path):
    file = tmp_path / "large.txt"
    with file.open("w") as stream:
        for _ in range(50):
            stream.write("It was a dark and stormy night. " * (1 << 15))  # 1 MiB
    assert file.stat().st_size == 50 << 20
    tracemalloc.start()
    pieces = list(sequences(file, worded, 512, 2000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, pieces)) == 2000
    assert peak < 8 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(OlmoeConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def test_recording_computes_logits_of_one_position_and_the_same_routing(folder, tmp_path):
    rows = [list(range(3, 40)), list(range(60, 80))]
    model = offload.load(folder, cache_experts=2, record_trace=True)
    widths = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    told = []
    assert record_over(model, rows, tmp_path / "t.npz", told.append) == 57
    assert (widths, told) == ([1, 1], [37, 20])
    found = RoutingTrace.load(tmp_path / "t.npz")
    whole = offload.load(folder, cache_experts=2, record_trace=True)
    with torch.no_grad():
        for row in rows:
            whole(torch.tensor([row]), use_cache=False)
    expected = whole.offload.trace()
    assert (found.expert_TLK == expected.expert_TLK).all()
    assert (found.sequence_T == expected.sequence_T).all()
    with pytest.raises(ValueError, match="holds no text"):
        record_over(model, [], tmp_path / "none.npz", told.append)
    for opened in (model, whole):
        opened.offload.close()


def test_a_model_without_the_option_computes_all_logits():
    class Plain:
        def forward(self, input_ids, use_cache=False):
            """Nothing."""

    assert only_last_logits(Plain()) == {}


def test_too_few_rows_for_a_predictor(folder, tmp_path, run, capsys):
    (tmp_path / "book.txt").write_text(STORY * 3)
    record = ("--data", tmp_path / "book.txt", "--out", tmp_path / "t.npz", "--tokens", 70, "--cache-experts", 2)
    assert run("trace", "record", folder, *record) == 0
    assert run("trace", "predictor", tmp_path / "t.npz", "--out", tmp_path / "p.npz") == 2
    assert "70 rows are too few" in capsys.readouterr().err
    assert not (tmp_path / "p.npz").exists()


def test_a_text_that_is_too_short_is_said(folder, tmp_path, run, capsys):
    (tmp_path / "book.txt").write_text("short")
    record = ("--data", tmp_path / "book.txt", "--out", tmp_path / "t.npz", "--cache-experts", 2)
    assert run("trace", "record", folder, *record) == 0
    assert "5 tokens recorded" in (error := capsys.readouterr().err)
    assert "8192 were wanted" in error
