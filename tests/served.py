"""A tiny model behind the engine, for its tests."""

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import offload
from offload.engine.engine import Engine
from offload.engine.events import Finished
from offload.engine.options import EngineOptions
from offload.engine.request import GenerationRequest

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}


def write_model(folder, dtype=torch.float32, config=None):
    """A model with random weights; spread enough that greedy answers do not repeat one token."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or Qwen3MoeConfig(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def serve(folder, *, options=None, context=256, cache_experts=4, prepare=None, **load):
    """An engine that is ready; `prepare` changes the model before it is served."""

    def open_model():
        torch.set_num_threads(1)
        model = offload.load(folder, cache_experts=cache_experts, context=context, **load)
        if prepare is not None:
            prepare(model)
        return model

    engine = Engine(open_model, options or EngineOptions())
    engine.wait_ready(60)
    return engine


def ask(prompt_ids, max_new_tokens=12, **options):
    return GenerationRequest(prompt_ids=tuple(prompt_ids), max_new_tokens=max_new_tokens, **options)


def collect(stream, timeout_s=60):
    """All tokens of a stream, and how it ended."""
    events = []
    while not events or not isinstance(events[-1], Finished):
        events.append(stream.next(timeout_s))
    return events[:-1], events[-1]


def ids_of(tokens):
    return [event.token_id for event in tokens]


def prompts(count, longest=40, seed=1):
    """Random prompts of different lengths, without the end token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
