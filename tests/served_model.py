"""A tiny model with a tokenizer and a chat template, and a server for it in a thread of this process."""

import threading
import time

import httpx
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

from offload.serve.asks import Asker
from offload.serve.grammars import Grammars
from offload.serve.web.answering import Desk
from offload.serve.web.app import make_app
from offload.serve.web.guard import Gate
from offload.serve.web.lifetime import Lifetime, address_of, listen
from offload.serve.web.metrics import Metrics
from offload.serve.web.service import Service
from offload.text.conversation import Conversations
from offload.text.vocabulary import Vocabulary

CHATML = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
    "{% endif %}"
)
END = "<|im_end|>"


def make_tokenizer(template=CHATML):
    """Bytes as tokens, with control tokens and marks as ChatML models have them: 262 tokens."""
    alphabet = {name: index for index, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", END)])
    core.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    made.chat_template = template
    return made


def save_model(folder, template=CHATML, **changes):
    """A random OLMoE with the tokenizer above, as a folder."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 262, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    ends = {"eos_token_id": 257, "pad_token_id": 0, "initializer_range": 0.4, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**{**sizes, **heads, **ends, **changes}))
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


class Served:
    """A server in a thread; `url` is where it listens."""

    def __init__(self, engine, tokenizer, gate=None, context=512, max_output=None, time_limit_s=None, **service):
        vocabulary = Vocabulary(tokenizer, 262, end_ids=[257])
        asker = Asker(vocabulary, Conversations(tokenizer), context, max_output)
        metrics = Metrics("tiny")
        self.engine = engine
        self.service = Service(names=("tiny", "gpt-4o"), metrics=metrics, **service)
        self._desk = Desk(engine, asker, Grammars(vocabulary), metrics, time_limit_s)
        self._listening = listen("127.0.0.1", 0)
        self.url = address_of(self._listening)
        self.lifetime = Lifetime(make_app(self.service, gate or Gate()), self.service, grace_s=5.0)
        self.thread = threading.Thread(target=self.lifetime.run_with, args=(self._listening, self.load), daemon=True)

    def load(self):
        self.service.desk = self._desk

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError("the server is not ready")

    def __exit__(self, *error):
        self.lifetime.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self._listening.close()
