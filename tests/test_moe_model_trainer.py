"""transformers' Trainer on our models: the loss's scale, balancing that steps, what is refused with a clear line."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from moe import MoEForCausalLM
from tests.rank_processes import run_ranks
from tests.trainer_ranks import ROUTERS_OF_RANKS, steps_of

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROUTING = {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}


def rows(count=8, length=16, ignored=0):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(96, (length,), generator=generator)
        labels = ids.clone()
        labels[: ignored * number] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def trained(model, folder, parts=1, data=None, steps=1, **changes):
    logging.set_verbosity_error()
    torch.manual_seed(0)
    settings = {
        "per_device_train_batch_size": 8 // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    } | changes
    trainer = Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=data or rows())
    trainer.train()
    return trainer


def moved(model, start):
    return torch.cat([(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)])


@pytest.mark.parametrize("ignored", [0, 1], ids=["equal-rows", "rows-with-ignored-labels"])
def test_micro_batches_make_the_step_of_the_whole_batch(tiny_config, tmp_path, ignored):
    steps = []
    for parts in (1, 4):
        torch.manual_seed(1)
        model = MoEForCausalLM(tiny_config(**ROUTING))
        start = [p.detach().clone() for p in model.parameters()]
        trained(model, tmp_path, parts, rows(ignored=ignored))
        steps.append(moved(model, start))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-6)


def test_the_balance_loss_has_the_same_weight_in_micro_batches(tiny_config, tmp_path):
    """With the language-model loss out of the way (zero head), what moves is the balance loss's; equal rows agree."""
    steps = []
    for parts in (1, 4):
        torch.manual_seed(1)
        model = MoEForCausalLM(tiny_config(balance_loss_weight=1.0, z_loss_weight=0.0))
        with torch.no_grad():
            model.lm_head.weight.zero_()
        start = [p.detach().clone() for p in model.parameters()]
        trained(model, tmp_path, parts, rows(count=1) * 8)
        steps.append(moved(model, start))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-6)


def test_balancing_steps_once_per_optimiser_step_over_all_its_micro_batches(tiny_config, tmp_path):
    config = tiny_config(router="loss_free", router_options={"bias_rate": 0.01})
    for parts in (1, 4):
        torch.manual_seed(1)
        model = MoEForCausalLM(config)
        expected = copy.deepcopy(model).train()
        trained(model, tmp_path, parts)
        with torch.no_grad():
            stats = expected(torch.stack([row["input_ids"] for row in rows()]), use_cache=False).router_stats
        expected.model.post_step([call.count_R for call in stats], 8 * 16)
        for ours, theirs in zip(model.model.routers, expected.model.routers, strict=True):
            torch.testing.assert_close(ours.bias_R, theirs.bias_R)
            assert ours.bias_R.any()
        assert model.model.optimizer_step == 1


def test_a_schedule_of_the_balance_loss_follows_the_outside_steps(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(balance_loss_schedule=[[2, 0.5]]))
    trained(model, tmp_path, steps=3)
    assert model.model.optimizer_step == 3
    assert model._balance_weight() == 0.5


def test_own_loops_are_left_alone(tiny_config):
    model = MoEForCausalLM(tiny_config(router="loss_free", router_options={"bias_rate": 0.01})).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    token_BS = rows()[0]["input_ids"][None]
    model(token_BS, labels=token_BS, use_cache=False).loss.backward()
    optimizer.step()
    assert model.model.optimizer_step == 0
    assert not any(router.bias_R.any() for router in model.model.routers)


def test_a_model_in_training_can_be_copied_and_pickled_and_its_copy_is_balanced_by_itself(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(router="loss_free"))
    trained(model, tmp_path)
    twin = copy.deepcopy(model)
    trained(twin, tmp_path)
    assert (model.model.optimizer_step, twin.model.optimizer_step) == (1, 2)
    assert isinstance(pickle.loads(pickle.dumps(model)), MoEForCausalLM)


def test_another_models_optimiser_does_not_count(tiny_config):
    model, other = (MoEForCausalLM(tiny_config()).train() for _ in range(2))
    token_BS = rows()[0]["input_ids"][None]
    model(token_BS, labels=token_BS, num_items_in_batch=15)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(token_BS, labels=token_BS).loss.backward()
    optimizer.step()
    assert model.model.optimizer_step == 0


class LowRank(nn.Module):
    """What adapter libraries put in a layer's place: the frozen layer and a small product beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)

    def forward(self, input_ids=None, labels=None, **kwargs):
        return self.base_model(input_ids=input_ids, labels=labels, **kwargs)


def test_adapters_train_and_frozen_routers_keep_their_balance(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(router="loss_free", router_options={"bias_rate": 0.01}))
    wrapped = Wrapped(model)
    steps = []
    for parts in (1, 4):
        own = copy.deepcopy(wrapped)
        trained(own, tmp_path, parts)
        steps.append(own.base_model.model.layers[0].self_attn.q_proj.up.weight.detach())
        assert not any(router.bias_R.any() for router in own.base_model.model.routers)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-6)


def test_evaluation_gathers_logits_and_loss_only(tiny_config, tmp_path):
    trainer = trained(MoEForCausalLM(tiny_config()), tmp_path, prediction_loss_only=False)
    found = trainer.predict(rows())
    assert found.predictions.shape == (8, 16, 96)
    model = trainer.model.eval()
    token_BS = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        assert found.metrics["test_loss"] == pytest.approx(model(token_BS, labels=token_BS).lm_loss.item(), rel=1e-4)


def test_a_tuple_has_loss_and_logits_first(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    token_BS = rows()[0]["input_ids"][None]
    whole = model(token_BS, labels=token_BS, use_cache=False)
    loss, logits, *_ = model(token_BS, labels=token_BS, use_cache=False, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)


def test_a_micro_batch_without_a_target_adds_nothing(tiny_config):
    model = MoEForCausalLM(tiny_config()).train()
    token_BS = rows()[0]["input_ids"][None]
    loss = model(token_BS, labels=torch.full_like(token_BS, -100), num_items_in_batch=10).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["output_router_logits", "output_hidden_states", "output_attentions"])
def test_outputs_that_are_not_there_are_refused(tiny_config, name):
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        MoEForCausalLM(tiny_config())(rows()[0]["input_ids"][None], **{name: True})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gradient_checkpointing": True}, "does not support (activation|gradient) checkpointing"),
        ({"label_smoothing_factor": 0.1}, "leaves out the balance losses"),
    ],
)
def test_what_would_train_otherwise_than_said_is_refused(tiny_config, tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        trained(MoEForCausalLM(tiny_config()), tmp_path, **changes)


@pytest.mark.slow
def test_two_processes_of_the_trainer_make_the_steps_of_one(subtests, tmp_path):
    """DistributedDataParallel as transformers starts it; each process takes every second micro-batch."""
    both = run_ranks(2, "trainer_ranks", str(tmp_path))
    for name in ROUTERS_OF_RANKS:
        alone = steps_of(name, tmp_path, parts=2)
        with subtests.test(f"weights of {name}"):
            torch.testing.assert_close(torch.tensor(both[name]["weights"]), alone["weights"], rtol=1e-5, atol=1e-6)
        with subtests.test(f"balancing state of {name}, on both processes"):
            state = torch.tensor(both[name]["state"], dtype=torch.float64)
            torch.testing.assert_close(state, alone["state"], rtol=1e-5, atol=1e-6)
            assert both[name]["is_equal"]
