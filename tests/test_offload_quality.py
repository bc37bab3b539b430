"""`quality`: its numbers against numbers worked out by hand and by torch, and a model against itself."""

import math

import pytest
import torch

import offload
from offload.lowbit.sensitivity import divergence
from offload.quality import predictions
from tests.quantised_checkpoints import write_olmoe


class Fixed:
    """A model of given logits."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self._logits = iter(logits)

    def __call__(self, _ids, *, use_cache):
        return type("Output", (), {"logits": next(self._logits)[None]})


def test_numbers_by_hand(tmp_path):
    """Two sequences of three tokens of a vocabulary of two; the last logits predict nothing."""
    texts = [[0, 1, 1], [1, 0, 1]]
    half, three = [0.0, 0.0], [0.0, math.log(3)]
    right = [torch.tensor([three, half, half]), torch.tensor([half, three, half])]
    wrong = [torch.tensor([half, three, three]), torch.tensor([half, three, half])]
    predictions.spool_logits(Fixed(right), texts, tmp_path)
    found = predictions.compare_predictions(Fixed(wrong), texts, tmp_path, torch.float32)
    loss = [-math.log(0.75), math.log(2), math.log(2), -math.log(0.75)]
    assert found.tokens == 4
    assert found.reference_loss == pytest.approx(sum(loss) / 4)
    assert found.loss_difference == pytest.approx(0.0, abs=1e-7)
    first, second = 0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert found.divergence == pytest.approx((first + second) / 4, rel=1e-5)
    assert found.worst_divergence == pytest.approx(max(first, second), rel=1e-5)
    assert found.agreement == 0.5


def test_the_interval_is_students_where_sequences_are_as_long():
    from scipy.stats import t

    means = torch.tensor([0.1, 0.3, -0.2, 0.5])
    low, high = predictions.interval_of((10 * means).tolist(), [10] * 4)
    half = float(t.ppf(0.975, 3)) * float(means.std()) / 2
    assert (low, high) == (pytest.approx(float(means.mean()) - half), pytest.approx(float(means.mean()) + half))
    assert predictions.interval_of([1.0], [5]) is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        counts = torch.randint(20, 60, (8,), generator=generator)
        means = 0.3 + torch.randn(8, generator=generator)
        low, high = predictions.interval_of((counts * means).tolist(), counts.tolist())
        hits += low <= 0.3 <= high
    assert 0.90 < hits / 400 < 0.985


def test_divergence_is_that_of_torch():
    log_p, log_q = (torch.randn(5, 9, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1))
    theirs = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence(log_p, log_q), theirs, atol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = write_olmoe(tmp_path_factory.mktemp("quality") / "model", **sizes)
    (folder.parent / "book.txt").write_text("a model judged against itself and worse ones " * 8)
    return folder


def test_a_model_against_itself_and_a_worse_one(model, tmp_path, run, capsys):
    offload.quantise(model, tmp_path / "experts", form="int2", method="rtn")
    data, reference = model.parent / "book.txt", offload.Contestant(path_or_id=model, cache_experts=2)
    judge = offload.Judge(reference, data, tmp_path, tokens=128, length=64)
    same = judge.judge(reference)
    assert (same.predictions.loss_difference, same.predictions.divergence, same.predictions.agreement) == (0, 0, 1)
    assert [layer.error for layer in same.layers] == [0.0]
    worse = judge.judge(offload.Contestant(path_or_id=model, pack=tmp_path / "experts", cache_experts=2))
    assert worse.predictions.divergence > 0
    assert worse.predictions.loss_difference != 0
    assert worse.layers[0].error > 0.05
    assert sum(worse.layers[0].rows_E) == 2 * 128
    assert worse.expert_bits[1] < 4 < worse.expert_bits[0] == 16
    command = ("quality", str(model), "--pack", str(tmp_path / "experts"), "--against", str(model), "--data", str(data))
    sizes = ("--tokens", "128", "--length", "64", "--cache-experts", "2")
    assert run(*command, *sizes, "--json", str(tmp_path / "q.json")) == 0
    assert "divergence, nats per token" in capsys.readouterr().out
    assert str(worse.predictions.divergence)[:12] in (tmp_path / "q.json").read_text()


def test_other_vocabularies_are_refused(tmp_path):
    predictions.spool_logits(Fixed([torch.zeros(3, 4)]), [[0, 1, 2]], tmp_path)
    with pytest.raises(ValueError, match="vocabularies of 4 and 5"):
        predictions.compare_predictions(Fixed([torch.zeros(3, 5)]), [[0, 1, 2]], tmp_path, torch.float32)
