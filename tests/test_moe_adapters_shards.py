"""Mixture of Shards: loops over shards with every gradient, LoRA as its special case, owners of shards, merging."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM, ShardPlan, attach_shards

TOKENS = torch.arange(22).view(2, 11)


def model_of(tiny_config, **settings):
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(num_shared_experts=1, **settings)).double().eval()


def filled(adapters):
    """Adapters that do something: B starts at zero."""
    with torch.no_grad():
        for number, weight in enumerate(adapters.parameters()):
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return adapters


def test_adapters_equal_loops_over_shards_with_every_gradient(tiny_config, tolerance):
    model = model_of(tiny_config)
    plan = ShardPlan(rank=4, budget_rank=2, private_rank=1, shards=4, alpha=6.0)
    adapters = filled(attach_shards(model, plan, ["o_proj"]))
    pool, layer = adapters.pools["o_proj"], model.model.layers[1].self_attn.o_proj
    x_TI = torch.randn(5, 32).double().requires_grad_()

    def row(shards, index):
        return torch.cat([shards[place] for place in index])

    rows = []
    for x in x_TI:
        y = layer.weight @ x
        for j in range(4):
            a, b = row(pool.a_shards, pool.index_a[1, j]), row(pool.b_shards, pool.index_b[1, j])
            y = y + 6.0 / 4 * (a @ x) * b
        rows.append(y)
    ours, loops = layer(x_TI), torch.stack(rows)
    torch.testing.assert_close(ours, loops, **tolerance[torch.float64])
    inputs, seed = [x_TI, pool.a_shards, pool.b_shards], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, loops)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_it_starts_as_the_model_and_trains_as_many_numbers_as_lora_of_the_budgets_rank(tiny_config):
    model = model_of(tiny_config)
    with torch.no_grad():
        before = model(TOKENS).logits
        adapters = attach_shards(model, ShardPlan(rank=4, budget_rank=2, private_rank=0, shards=2))
        assert torch.equal(model(TOKENS).logits, before)
    matrices = [m for name, m in model.named_modules() if name.endswith("_proj") and isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 3 * 7
    assert sum(p.numel() for p in adapters.parameters()) == sum(2 * sum(m.weight.shape) for m in matrices)
    assert not any(p.requires_grad for p in model.parameters())
    filled(adapters)
    assert not torch.equal(model(TOKENS).logits, before)
    adapters.remove()
    assert torch.equal(model(TOKENS).logits, before)


def test_with_private_shards_alone_it_is_lora(tiny_config, tolerance):
    model = model_of(tiny_config)
    adapters = filled(attach_shards(model, ShardPlan(rank=3, budget_rank=3, private_rank=3, shards=1, alpha=3.0)))
    pool = adapters.pools["v_proj"]
    for number in range(3):
        a_rI, b_Or = pool.factors(number)
        assert torch.equal(a_rI, pool.a_shards[3 * number : 3 * number + 3])
        assert torch.equal(b_Or, pool.b_shards[3 * number : 3 * number + 3].T)


def test_private_shards_have_one_owner_and_pairs_part_only_where_told(tiny_config):
    plan = ShardPlan(rank=4, budget_rank=2, private_rank=1, shards=2)
    pool = attach_shards(model_of(tiny_config), plan).pools["q_proj"]
    shared = (2 - 1) * 3 * 2
    for index in (pool.index_a, pool.index_b):
        assert all(len(set(rows.flatten().tolist())) == 8 for rows in index)
        private = index[index >= shared]
        assert len(private) == len(set(private.tolist())) == 3 * 2
        assert (index[:, :3] < shared).all()
    assert not torch.equal(pool.index_a, pool.index_b)
    pairs = ShardPlan(rank=4, budget_rank=2, private_rank=1, shards=2, is_dissociated=False)
    pool = attach_shards(model_of(tiny_config), pairs).pools["q_proj"]
    assert torch.equal(pool.index_a, pool.index_b)


def test_merged_it_is_a_plain_checkpoint_and_decodes_as_its_prefill(tiny_config, tmp_path, tolerance):
    model = model_of(tiny_config)
    adapters = filled(attach_shards(model, ShardPlan(rank=4, budget_rank=2, shards=2)))
    with torch.no_grad():
        tuned = model(TOKENS, use_cache=True)
        step = model(TOKENS[:, -1:], past_key_values=model(TOKENS[:, :-1], use_cache=True).past_key_values)
        torch.testing.assert_close(step.logits[:, -1], tuned.logits[:, -1], **tolerance[torch.float64])
        adapters.merge()
        torch.testing.assert_close(model(TOKENS).logits, tuned.logits, **tolerance[torch.float64])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_kept_adapters_are_what_they_were(tiny_config):
    plan = ShardPlan(rank=4, budget_rank=2, shards=2)
    model, other = model_of(tiny_config), model_of(tiny_config)
    adapters = filled(attach_shards(model, plan))
    attach_shards(other, ShardPlan(rank=4, budget_rank=2, shards=2, seed=5)).load_state_dict(adapters.state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"rank": 0}, "rank, budget_rank and shards must be at least 1"),
        ({"private_rank": 3}, r"private_rank must lie in 0\.\.2"),
        ({"shards": 5}, "shards must divide inputs and outputs of q_proj, 32 and 32"),
        ({"rank": 9, "shards": 2}, "draws 16 shared shards, but 3 of them share 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny_config, plan, message):
    with pytest.raises(ValueError, match=message):
        attach_shards(model_of(tiny_config), ShardPlan(**plan))


def test_a_model_without_such_layers_is_refused(tiny_config):
    with pytest.raises(ValueError, match="no linear layers named w1"):
        attach_shards(model_of(tiny_config), ShardPlan(), ["w1"])
