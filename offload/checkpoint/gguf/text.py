"""The tokenizer that a GGUF file describes, with its chat template."""

from typing import Any

from .head import GgufHead

GPT2_AND_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Ways of splitting text that transformers 5.23 does not know: single digits first, then as GPT-2 does.

Source: `llm_vocab_load` of llama.cpp (src/llama-vocab.cpp)."""
LIKE_GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(head: GgufHead) -> Any:
    """A fast tokenizer of transformers; its `chat_template` is the file's.

    Raises:
        ValueError: if the file has none, or splits text in a way that neither transformers nor we know.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    found = {
        group: {
            name: _plain(head.metadata[f"tokenizer.{key}"])
            for key, name in names.items()
            if f"tokenizer.{key}" in head.metadata
        }
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    described, settings = found["tokenizer"], found["tokenizer_config"]
    tokens = described.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"model {head.file}: the file has no vocabulary; put the tokenizer's files beside it")
    _expect_known_split(head, described)
    if described.get("tokenizer_type") == "llama":
        settings.setdefault("add_bos_token", True)  # as llama.cpp does for vocabularies of SentencePiece
    for name, key in SPECIAL.items():
        number = head.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(f"model {head.file}: {key} token {number} is not among its {len(tokens)} tokens")
        settings[name] = None if number is None else tokens[number]
    backend, _ = convert_gguf_tokenizer(head.architecture, described)
    if described.get("pre_tokenizer_type") in GPT2_AND_DIGITS:
        backend.pre_tokenizer = _digits_then_bytes()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)


def end_tokens(head: GgufHead) -> list[int]:
    """Ids that end a text: the end of a text, and of a turn where the file names one."""
    found = [head.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return sorted({number for number in found if isinstance(number, int)})


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _digits_then_bytes() -> Any:
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(steps)


def _expect_known_split(head: GgufHead, described: dict[str, Any]) -> None:
    """Refuse a byte-level vocabulary whose way of splitting text is unknown: some of its tokens would be wrong."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = described.get("pre_tokenizer_type", "default")
    if described.get("tokenizer_type") != "gpt2":
        return
    if split not in (*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_AND_DIGITS, *LIKE_GPT2):
        raise ValueError(
            f"model {head.file}: its tokenizer splits text by the rule {split!r}, which is not known here; "
            "put the model's tokenizer.json and config.json beside it"
        )
