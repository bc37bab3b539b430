"""Held-out text by domain: the folders directly below the folder of a text are its domains."""

from dataclasses import replace

from moe import MoEForCausalLM

from ..train.corpus import Corpus
from ..train.description.config import TrainConfig
from ..train.torch_run import evaluate


def domain_corpora(corpus: Corpus) -> dict[str, Corpus]:
    """Per domain the same corpus with that domain's held-out text alone; one without held-out text is left out."""
    found = {}
    for name, start, end in corpus.held_out_domains:
        sizes = corpus.held_out_bytes
        own = {"held_out": corpus.held_out[start:end], "held_out_bytes": None if sizes is None else sizes[start:end]}
        if end - start >= 2:
            found[name] = replace(corpus, **own)
    return found


def bits_by_domain(model: MoEForCausalLM, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """Held-out bits per byte of each domain, every one scored on up to `config.held_out_tokens` tokens."""
    return {name: evaluate(model, own, config) for name, own in domain_corpora(corpus).items()}
