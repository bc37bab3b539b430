"""Predictors and the prefetcher's judgement."""

import torch

from offload.prefetch import GatePredictor, Prefetcher, TransitionPredictor


def test_gate_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    predictor = GatePredictor([None, (weight, None), (weight, torch.tensor([0.0, -9.0, 9.0]))], top_k=2)
    x = torch.tensor([[2.0, 1.0]])
    assert predictor.predict(0, x, []) == []
    assert predictor.predict(1, x, []) == [0, 1]
    assert predictor.predict(2, x, []) == [2, 0]


def test_transitions_are_learned():
    predictor = TransitionPredictor(3, 4, top_k=1)
    for _ in range(3):
        predictor.predict(1, None, [0])
        predictor.predict(2, None, [3])
    assert predictor.predict(1, None, [0]) == [3]


class _Slots:
    num_experts = 8

    def __init__(self):
        self.asked = []

    def read_ahead(self, expert, pinned, most):
        self.asked.append(expert)
        return True


def test_only_the_likeliest_and_only_while_it_pays():
    weight = torch.eye(4)
    prefetcher = Prefetcher(GatePredictor([(weight, None)], top_k=3), most=2)
    slots = _Slots()
    prefetcher.look_ahead(0, torch.tensor([[0.1, 0.9, 0.5, 0.2]]), torch.tensor([[0]]), slots)
    assert slots.asked == [1, 2]
    prefetcher.judge(issued=300, useful=100, late=100)
    assert prefetcher.is_active
    prefetcher.judge(issued=300, useful=50, late=20)
    assert not prefetcher.is_active
    prefetcher.look_ahead(0, torch.tensor([[0.1, 0.9, 0.5, 0.2]]), torch.tensor([[0]]), slots)
    assert slots.asked == [1, 2]
