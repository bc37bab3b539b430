"""A small model, examples for it, and a resident model to hold fine-tuning against."""

import json

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe import save_byte_tokenizer
from offload.finetune.examples import read_rows

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
LENGTH = 32


def save_model(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = SIZES | HEADS | {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2} | changes
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate.weight" in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_examples(file):
    texts = ["to be or not to be", "all the world is a stage", "the rest is silence", "brevity is the soul of wit"]
    lines = [{"prompt": f"{number}: ", "completion": text} for number, text in enumerate(texts * 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def save_models(folder, *dtypes, **changes):
    """A model of each of these number formats, named by it, and the examples."""
    torch.set_num_threads(1)
    for dtype in dtypes:
        save_model(folder / dtype, getattr(torch, dtype), **changes)
    save_examples(folder / "data.jsonl")
    return folder


def rows_of(folder, data, length=LENGTH):
    return read_rows(data, folder, 256, length)
