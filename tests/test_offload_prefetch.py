"""Predictors and the prefetcher's judgement."""

import copy

import numpy as np
import pytest
import torch

from offload.prefetch.predictor import TrainedPredictor, hot_TLE, inputs_TV
from offload.prefetch.predictor_fit import fit_predictor, precision_and_recall
from offload.prefetch.prefetch import GatePredictor, Prefetcher, TransitionPredictor
from routing.traces import RoutingTrace


def test_gate_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    predictor = GatePredictor([None, (weight, None), (weight, torch.tensor([0.0, -9.0, 9.0]))], top_k=2)
    x = torch.tensor([[2.0, 1.0]])
    assert predictor.predict(0, 1, x) == []
    assert predictor.predict(1, 1, x) == [0, 1]
    assert predictor.predict(2, 1, x) == [2, 0]


def test_transitions_are_learned():
    predictor = TransitionPredictor(3, 4, top_k=1)
    for _ in range(3):
        predictor.note(0, [0])
        predictor.note(1, [3])
    predictor.note(0, [0])
    assert predictor.predict(1, 1, None) == [3]


class _Slots:
    num_experts = 8

    def __init__(self):
        self.asked = []

    def read_ahead(self, expert, pinned, most):
        self.asked.append(expert)
        return True


def test_only_the_likeliest_and_only_while_it_pays():
    weight = torch.eye(4)
    prefetcher = Prefetcher(GatePredictor([None, (weight, None)], top_k=3), most=2)
    layers = [_Slots(), _Slots()]
    x, experts = torch.tensor([[0.1, 0.9, 0.5, 0.2]]), torch.tensor([[0]])
    prefetcher.look_ahead(0, x, experts, layers)
    prefetcher.look_ahead(1, x, experts, layers)
    assert [slots.asked for slots in layers] == [[], [1, 2]]
    prefetcher.judge(issued=300, useful=100, late=100)
    assert prefetcher.is_active
    prefetcher.judge(issued=300, useful=50, late=20)
    assert not prefetcher.is_active
    prefetcher.look_ahead(0, x, experts, layers)
    assert layers[1].asked == [1, 2]


def chained_trace(tokens=600, layers=4, experts=8):
    """Expert e is followed by e + 1 in the next layer, always; the first layer is random."""
    rng = np.random.default_rng(0)
    first_T = rng.integers(0, experts, tokens)
    expert_TLK = (first_T[:, None, None] + np.arange(layers)[None, :, None]) % experts
    return RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16),
        sequence_T=np.repeat(np.arange(tokens // 60), 60).astype(np.int32),
        metadata={"num_experts": experts},
    )


@pytest.fixture(scope="module")
def fitted():
    return fit_predictor(chained_trace().rows(0, 500))


def test_trained_predictor_learns_a_rule_and_survives_a_file(fitted, tmp_path):
    trace = chained_trace()
    for precision, recall in precision_and_recall(fitted, trace.rows(500, 600)).values():
        assert precision == 1
        assert recall > 0.95
    fitted.save(tmp_path / "p.npz")
    loaded = TrainedPredictor.load(tmp_path / "p.npz").expect(4, 8)
    for row in trace.expert_TLK[500:550, :, 0].tolist():
        for layer, expert in enumerate(row):
            loaded.note(layer, [expert])
            for ahead in (1, 2):
                if layer + ahead < 4:
                    assert loaded.predict(layer + ahead, ahead, None)[:1] in ([], [row[layer + ahead]])


def test_what_the_runtime_computes_is_what_was_trained(fitted):
    trace = chained_trace(120)
    fitted, hot = copy.deepcopy(fitted), hot_TLE(trace)
    rng = np.random.default_rng(1)
    fitted.weight_ALVE += rng.normal(size=fitted.weight_ALVE.shape).astype(np.float32)
    is_first_T = np.arange(120) == 0
    for token in range(120):
        for layer in range(4):
            fitted.note(layer, trace.expert_TLK[token, layer].tolist())
            for place, ahead in enumerate(fitted.distances):
                if layer + ahead < 4:
                    x_V = inputs_TV(hot, is_first_T, layer + ahead, ahead)[token]
                    logit_E = x_V @ fitted.weight_ALVE[place, layer + ahead] + fitted.bias_ALE[place, layer + ahead]
                    np.testing.assert_allclose(
                        fitted.probability_E(layer + ahead, ahead), 1 / (1 + np.exp(-logit_E)), rtol=1e-4, atol=1e-6
                    )


def test_files_that_are_no_predictor_are_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        TrainedPredictor.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a file of"):
        TrainedPredictor.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "odd.npz", version=1, weight_ALVE=np.zeros((2, 3, 5, 4)), bias_ALE=np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        TrainedPredictor.load(tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="this model has 5 of 8"):
        fitted.expect(5, 8)
