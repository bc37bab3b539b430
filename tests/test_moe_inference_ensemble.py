"""Ensembles of whole models: true means of probabilities, a causal posterior, generation with caches and beams."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe import EnsembleConfig, MoEForCausalLM, ensemble


@pytest.fixture
def members(tiny_config):
    small = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return [
        MoEForCausalLM(tiny_config(initializer_range=0.5)).eval(),
        LlamaForCausalLM(small).eval(),
        MoEForCausalLM(tiny_config(num_hidden_layers=2, hidden_size=16, initializer_range=0.5)).eval(),
    ]


@torch.no_grad()
def by_loops(members, token_BS, weighting, prior=None, used=None):
    """Probabilities [B, S, V], one position at a time from whole prefixes."""
    B, S = token_BS.shape
    result = torch.zeros(B, S, 96, dtype=torch.float64)
    for b in range(B):
        evidence = [1.0] * len(members)
        for s in range(S):
            share = [member(token_BS[b : b + 1, : s + 1]).logits[0, -1].double().softmax(-1) for member in members]
            if weighting == "posterior" and s > 0:
                for m, member in enumerate(members):
                    before = member(token_BS[b : b + 1, :s]).logits[0, -1].double().softmax(-1)
                    evidence[m] *= float(before[token_BS[b, s]])
            weight = torch.tensor(evidence).double() * torch.tensor(prior or [1.0] * len(members)).double()
            if used is not None:
                weight[weight.argsort(descending=True)[used:]] = 0
            weight = weight / weight.sum()
            result[b, s] = sum(w * p for w, p in zip(weight, share, strict=True))
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "uniform"},
        {"weighting": "posterior"},
        {"weighting": "posterior", "prior": [0.7, 0.2, 0.1]},
        {"weighting": "posterior", "members_used": 1},
        {"weighting": "posterior", "members_used": 2},
    ],
    ids=str,
)
def test_mixture_equals_plain_loops(members, options):
    token_BS = torch.randint(0, 96, (2, 7))
    mixed = ensemble(members, **options)
    with torch.no_grad():
        found = mixed(token_BS).logits.double().exp()
    plain = by_loops(members, token_BS, options["weighting"], options.get("prior"), options.get("members_used"))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 7).double(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_trap_uniform_means_probabilities_not_their_logarithms(members):
    token_BS = torch.randint(0, 96, (2, 7))
    logs = torch.stack([member(token_BS).logits.log_softmax(-1) for member in members])
    found = ensemble(members, weighting="uniform")(token_BS).logits
    torch.testing.assert_close(found.exp(), logs.exp().mean(0), atol=1e-6, rtol=1e-5)
    geometric = logs.mean(0)
    assert geometric.exp().sum(-1).max() < 0.99, "the mean of logarithms is no distribution"
    assert not torch.allclose(found, geometric, atol=1e-2)


@torch.no_grad()
def test_posterior_is_causal_and_follows_the_evidence(members):
    mixed, token_BS = ensemble(members), torch.randint(0, 96, (1, 9))
    changed = token_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 96
    before, after = mixed(token_BS).logits, mixed(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)
    own = members[1].generate(token_BS[:, :1], max_new_tokens=24, do_sample=False, pad_token_id=0)
    log_prob = mixed._member_log_probs(own, None, None, {})
    weight = mixed.log_weights(log_prob, own).exp()
    torch.testing.assert_close(weight[0, :, 0], torch.full((3,), 1 / 3))
    assert weight[0, 1, -1] > 0.99, "the member that wrote the text is found out"


@pytest.mark.parametrize("weighting", ["uniform", "posterior"])
def test_generate_equals_prefill_with_padding_and_beams(members, weighting):
    mixed, prompt = ensemble(members, weighting=weighting), torch.randint(0, 96, (2, 5))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = mixed.generate(prompt, return_dict_in_generate=True, output_logits=True, **settings)
    with torch.no_grad():
        prefill = mixed(made.sequences).logits
    for step, logits in enumerate(made.logits):
        torch.testing.assert_close(logits, prefill[:, 4 + step], atol=1e-4, rtol=1e-4)
    uncached = mixed.generate(prompt, use_cache=False, **settings)
    assert torch.equal(uncached, made.sequences)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), prompt], dim=1)
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    again = mixed.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(again[:, 3:], made.sequences)
    beams = [mixed.generate(prompt, num_beams=3, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*beams)


def test_one_member_is_that_member(members):
    token_BS = torch.randint(0, 96, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(ensemble(members[:1])(token_BS).logits, members[0](token_BS).logits.log_softmax(-1))


def test_loss_is_that_of_the_mixture_and_reaches_every_member(members):
    mixed, token_BS = ensemble(members), torch.randint(0, 96, (2, 7))
    output = mixed(token_BS, labels=token_BS)
    share = output.logits[:, :-1].gather(-1, token_BS[:, 1:, None])
    torch.testing.assert_close(output.loss, -share.mean())
    output.loss.backward()
    for member in members:
        assert member.lm_head.weight.grad.any()


def test_comes_back_from_one_checkpoint_bit_for_bit(members, tmp_path):
    mixed, token_BS = ensemble(members, prior=[0.5, 0.3, 0.2], members_used=2), torch.randint(0, 96, (2, 7))
    mixed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.prior == [0.5, 0.3, 0.2]
    with torch.no_grad():
        assert torch.equal(mixed(token_BS).logits, loaded(token_BS).logits)


def test_bad_settings_say_what_was_expected(members, tiny_config):
    for options, message in (
        ({"weighting": "mean"}, "weighting must be one of"),
        ({"prior": [0.5, 0.5]}, "3 positive probabilities"),
        ({"prior": [0.5, 0.3, 0.1]}, "sum to 1"),
        ({"weighting": "uniform", "prior": [0.5, 0.3, 0.2]}, "takes no prior"),
        ({"members_used": 4}, "1..3"),
    ):
        with pytest.raises(ValueError, match=message):
            ensemble(members, **options)
    with pytest.raises(ValueError, match="one vocabulary"):
        ensemble([members[0], MoEForCausalLM(tiny_config(vocab_size=50))])
    with pytest.raises(ValueError, match="at least one member"):
        ensemble([])
    assert EnsembleConfig().members is None
