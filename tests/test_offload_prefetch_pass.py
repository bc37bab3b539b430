"""Predictors of whole passes: what they learn, what they look at, what the runtime makes of them."""

import numpy as np
import pytest
import torch

import offload
from moe import MoEConfig, MoEForCausalLM
from offload.cache.predicted import PredictedUse
from offload.cache.simulate import simulate
from offload.prefetch import pass_fit, predictor_fit
from offload.prefetch.find_routers import make_prefetcher
from offload.prefetch.pass_model import CONTEXT, PassModel, PassSizes
from offload.prefetch.pass_predictor import LastTokens, PassPredictor, PassPrefetcher
from offload.prefetch.predictor import TrainedPredictor, read_predictor
from offload.serve.batch_answers import form
from routing.traces import RoutingTrace


def following_trace(tokens=900, layers=2, experts=4):
    """Layer l of a token visits the expert (token before it + l) mod E; the first of a sequence has 0 before it."""
    rng = np.random.default_rng(0)
    token_T = rng.integers(0, experts, tokens).astype(np.int32)
    sequence_T = np.repeat(np.arange(tokens // 90), 90).astype(np.int32)
    before_T = np.where(np.diff(sequence_T, prepend=-1) > 0, 0, np.roll(token_T, 1))
    expert_TLK = (before_T[:, None, None] + np.arange(layers)[None, :, None]) % experts
    return RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16),
        sequence_T=sequence_T,
        token_T=token_T,
        metadata={"num_experts": experts},
    )


def quickly_fitted(trace, steps):
    """With fewer steps than a real trace gets: these rules are simple."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_fit, "LEAST_STEPS", steps)
        patch.setattr(pass_fit, "WINDOWS", 16)
        patch.setattr(predictor_fit, "LEAST_STEPS", 20)
        patch.setattr(predictor_fit, "BATCH", 64)
        return pass_fit.fit_pass_predictor(trace)


@pytest.fixture(scope="module")
def fitted():
    return quickly_fitted(following_trace().rows(0, 720), 60)


def test_it_learns_what_follows_from_the_token_before(fitted):
    trace = following_trace().rows(720)
    scores = pass_fit.score(fitted, trace)
    assert min(*scores.before, scores.top) > 0.98
    assert min(scores.corrected[1]) > 0.98
    assert scores.hit_rates["belady"] >= scores.hit_rates["predicted"]


def test_what_a_trace_is_judged_by_is_what_decoding_would_say(fitted):
    """Every row once, with at least half a window to look back on, or all of its sequence."""
    trace = following_trace().rows(0, 300)
    found, token_T = pass_fit.logits_TLE(fitted.model, trace), trace.token_T.astype(np.int64)
    for row in (0, 5, CONTEXT - 1, 89, 90, 91):
        first = row // 90 * 90
        expected = fitted.model.logits(token_T[None, first : row + 1][:, -CONTEXT:])[0, -1]
        if row - first < CONTEXT:
            np.testing.assert_allclose(found[row], expected, atol=1e-4)
        assert (found[row].argmax(axis=-1) == expected.argmax(axis=-1)).all()


def test_last_tokens_are_those_of_the_cache():
    rng = np.random.default_rng(1)
    last, whole, length = LastTokens(), np.zeros((2, 0), np.int64), 0
    for _ in range(200):
        kind = rng.integers(4)
        if kind == 0:  # other sequences begin
            whole = np.zeros((int(rng.integers(1, 3)), 0), np.int64)
        elif kind == 1 and whole.shape[1] > 3:  # the cache is cropped by less than is known
            whole = whole[:, : whole.shape[1] - int(rng.integers(1, 3))]
        past = whole.shape[1]
        new = rng.integers(0, 99, (len(whole), int(rng.integers(1, 40))))
        whole = np.concatenate([whole, new], axis=1)
        found = last.add(new, past)
        length = found.shape[1]
        assert length >= min(CONTEXT, whole.shape[1]) - 2 or kind == 1
        assert np.array_equal(found, whole[:, whole.shape[1] - length :])
    assert np.array_equal(last.add(new, 10_000), new[:, -CONTEXT:])  # what came before is not known


def test_prediction_decides_who_leaves():
    cache = PredictedUse(2, 3)
    cache.access([0, 1])
    cache.expect(np.array([0.9, 0.1, 0.0]))
    assert cache.evict() == 1
    cache.insert(2)
    for _ in range(20):
        cache.expect(np.array([0.0, 0.0, 0.9]))
    assert cache.evict() == 0
    with pytest.raises(ValueError, match="needs a predictor, which a trace is not"):
        simulate(following_trace(), 2, policies=["predicted"])


def test_a_file_keeps_every_number_and_others_are_refused(fitted, tmp_path):
    fitted.save(tmp_path / "p.npz")
    stored = read_predictor(tmp_path / "p.npz")
    loaded = PassPredictor.of_arrays("p", stored, TrainedPredictor.of_arrays("p", stored))
    tokens = np.arange(8).reshape(2, 4) % 4
    assert np.array_equal(loaded.model.logits(tokens), fitted.model.logits(tokens))
    stored["pass.norm.weight"] = np.full_like(stored["pass.norm.weight"], np.nan)
    np.savez(tmp_path / "nan.npz", version=1, **stored)
    layers = [type("Layer", (), {"num_experts": 4})] * 2
    with pytest.raises(ValueError, match=r"predictor .*nan\.npz: norm\.weight must be finite"):
        make_prefetcher(str(tmp_path / "nan.npz"), torch.nn.Module(), layers, 1)
    with pytest.raises(ValueError, match="this model has 3 of 4"):
        make_prefetcher(str(tmp_path / "p.npz"), torch.nn.Module(), [*layers, layers[0]], 1)
    with pytest.raises(ValueError, match="cannot have these sizes"):
        PassSizes(vocab_size=1 << 40, num_layers=2, num_experts=4)
    with pytest.raises(ValueError, match="has no token ids"):
        pass_fit.fit_pass_predictor(RoutingTrace(expert_TLK=np.zeros((9, 2, 1), int), sequence_T=np.zeros(9, int)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A small model, its plain answer, and a predictor of its passes that was trained on that very text."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MoEConfig(vocab_size=96, num_experts=6, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, **sizes)
    MoEForCausalLM(config).save_pretrained(folder)
    prompt = torch.randint(96, (1, 5))
    plain = offload.load(folder, cache_experts=4, record_trace=True)
    answer = plain.generate(prompt, max_new_tokens=40, do_sample=False)
    trace = plain.offload.trace()
    assert trace.token_T.tolist() == answer[0, :-1].tolist()
    file = folder / "pass.npz"
    quickly_fitted(trace, 80).save(file)
    return folder, prompt, answer, file, plain.offload.report()


def test_reads_begin_before_the_pass_and_no_token_changes(learned):
    folder, prompt, answer, file, plain = learned
    model = offload.load(folder, cache_experts=4, prefetch=file, policy="predicted")
    issued, first = [], model.model.moe_layers[0]
    first.register_forward_pre_hook(
        lambda *_: issued.append(sum(slots.ahead_counters.issued for slots in model.offload.runtime.layers))
    )
    assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), answer)
    found = model.offload.report()
    assert found["policy"] == "predicted"
    assert found["misses"] < 0.8 * plain["misses"]
    assert issued[1] > 0
    reads = found["prefetch"]
    assert reads["useful"] + reads["late"] > reads["wasted"]
    batch = prompt.repeat(2, 1)
    assert torch.equal(model.generate(batch, max_new_tokens=4, do_sample=False)[0], answer[0, :9])
    assert model.model(inputs_embeds=torch.zeros(1, 3, 32)) is not None  # nothing is known of these
    model.offload.close()


def test_the_policy_without_its_predictor_is_refused(learned):
    with pytest.raises(ValueError, match="keeps what a predictor of whole passes expects"):
        offload.load(learned[0], cache_experts=4, policy="predicted")


def test_logits_of_a_whole_vocabulary_are_bounded():
    model = PassModel(PassSizes(vocab_size=4, num_layers=2, num_experts=3)).eval()
    assert np.array_equal(model.logits(np.array([[99]])), model.logits(np.array([[3]])))


def test_batches_are_formed_from_prompts_with_like_experts(fitted):
    """Prompts of token 0 alone and of token 2 alone come in turn; their experts differ."""
    prompts = [[2 * (place % 2)] * 6 for place in range(8)]
    runtime = type("Runtime", (), {"prefetcher": PassPrefetcher(fitted, 2)})
    model = torch.nn.Module()
    model.offload = type("Offload", (), {"runtime": runtime})
    formed = form(model, prompts, 4)
    assert sorted(map(sorted, formed.batches)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert formed.experts_after < formed.experts_before
    assert "2 batches by the predictor" in str(formed)
