"""Calls and options at the edge: no valid token, tokens of zeros, another K, a bias per call, wrong types."""

import pytest
import torch

from moe import MoEConfig, MoEForCausalLM
from routing import Carry, RouterSizes, RoutingContext, auxiliary_loss, build_routers

ROUTERS = {
    "mixtral": {},
    "switch": {},
    "gshard": {},
    "deepseek_v2": {"num_groups": 3},
    "deepseek_v3": {},
    "sigma_moe": {},
    "xmoe": {},
    "rmoe": {"state_width": 8},
    "remoe": {},
    "expert_choice": {},
    "sinkhorn": {},
    "hash": {},
    "soft_moe": {"slots_per_expert": 2},
    "pregate": {"inner": "deepseek_v3"},
}
# training draws numbers for padding too
DRAWS = {"switch", "gshard", "sigma_moe"}


def model_of(tiny_config, router, options=None, **overrides):
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(router=router, router_options=options or {}, **overrides))


def one(name, options=None, **sizes):
    sizes = {"width": 12, "num_experts": 8, "top_k": 2, "num_layers": 1, "vocab_size": 64} | sizes
    torch.manual_seed(0)
    router = build_routers(name, RouterSizes(**sizes), options)[0]
    router.init_parameters(0.5)
    return router


def call(router, x_TD, **context):
    return router(x_TD, Carry(), RoutingContext(**context))


def loss_of(model, token_BS, mask_BS):
    labels = token_BS.masked_fill(mask_BS == 0, -100)
    return model(token_BS, attention_mask=mask_BS, labels=labels).loss


def gradients(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_sequence_of_padding_alone_changes_no_loss_and_no_gradient_is_lost(router, tiny_config):
    model = model_of(tiny_config, router, ROUTERS[router]).train()
    token_BS, mask_BS = torch.randint(1, 96, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask_BS[1] = 0
    torch.manual_seed(1)
    loss = loss_of(model, token_BS, mask_BS)
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model))
    if router not in DRAWS:
        torch.manual_seed(1)
        alone = loss_of(model, token_BS[:1], mask_BS[:1])
        torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_call_without_any_valid_token_has_no_auxiliary_loss(router, tiny_config):
    model = model_of(tiny_config, router, ROUTERS[router]).train()
    stats = model(torch.randint(1, 96, (2, 8)), attention_mask=torch.zeros(2, 8, dtype=torch.long)).router_stats
    loss = auxiliary_loss(stats, balance_weight=1.0, z_weight=1.0)
    assert loss == 0
    assert all(layer.entropy == 0 and layer.true_load == 0 for layer in stats)
    model.model.post_step([layer.count_R for layer in stats], 0)
    assert all(buffer.isfinite().all() for buffer in model.buffers() if buffer.is_floating_point())


def test_remoe_learns_nothing_from_a_step_without_tokens(tiny_config):
    model = model_of(tiny_config, "remoe")
    before = model.model.routers[0].control.penalty_weight.clone()
    model.model.post_step([torch.zeros(6, dtype=torch.long)] * 3, 0)
    assert torch.equal(model.model.routers[0].control.penalty_weight, before)


def test_soft_moe_counts_slots_of_sequences_with_tokens_only(tiny_config):
    model = model_of(tiny_config, "soft_moe", {"slots_per_expert": 2})
    mask_BS = torch.tensor([[1] * 8, [0] * 8])
    for stats in model(torch.randint(1, 96, (2, 8)), attention_mask=mask_BS).router_stats:
        assert stats.count_R.tolist() == [2] * 6


@pytest.mark.parametrize("logit_std", [None, 1.0])
def test_moepp_survives_tokens_of_zeros(logit_std, tiny_config):
    options = {"logit_std": logit_std} if logit_std else {}
    model = model_of(
        tiny_config, "moepp", options, zero_compute_experts=["zero", "copy", "constant"], pad_token_id=0
    ).train()
    token_BS, mask_BS = torch.randint(1, 96, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask_BS[0, :3] = 0
    token_BS[mask_BS == 0] = 0
    loss_of(model, token_BS, mask_BS).backward()
    assert all(grad.isfinite().all() for grad in gradients(model))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_k_of_a_call_stays_within_the_groups(name):
    router = one(name, {"num_groups": 4, "groups_kept": 2})
    context = {"sequence_T": torch.zeros(20, dtype=torch.long)}
    routing, _, _ = call(router, torch.randn(20, 12), top_k=4, **context)
    assert all(len({expert // 2 for expert in row}) <= 2 for row in routing.expert_TK.tolist())
    with pytest.raises(ValueError, match=r"whole number in 1..4, the experts that a token can choose from; got 5"):
        call(router, torch.randn(20, 12), top_k=5, **context)


@pytest.mark.parametrize("top_k", ["3", 2.0, True, 0, 9])
def test_k_of_a_call_is_a_whole_number_of_experts(top_k):
    with pytest.raises(ValueError, match=r"top_k of a call must be a whole number in 1\.\.8"):
        call(one("olmoe", top_k=3), torch.randn(4, 12), top_k=top_k)


def test_expert_choice_with_its_own_mean_refuses_another_k():
    with pytest.raises(ValueError, match="cannot change K between calls"):
        call(one("expert_choice", {"mean_experts": 1.0}), torch.randn(8, 12), top_k=4)
    routing, _, _ = call(one("expert_choice"), torch.randn(8, 12), top_k=4)
    assert routing.count_R.tolist() == [4] * 8


def test_expert_choice_capacity_is_exact_in_decimal():
    router = one("expert_choice", {"mean_experts": 2.3}, num_experts=10)
    routing, _, _ = call(router, torch.randn(100, 12))
    assert routing.count_R.tolist() == [23] * 10  # int(2.3 * 100 / 10) would be 22


def test_equal_groups_go_to_the_lower_id():
    router = one("deepseek_v3", {"num_groups": 4, "groups_kept": 2}, num_experts=16, top_k=4)
    routing, _, _ = call(router, torch.zeros(1, 12))
    assert routing.expert_TK.tolist() == [[0, 1, 2, 3]]


def test_sigma_weights_sum_to_one_over_the_experts_that_dropout_left():
    router = one("sigma_moe", {"expert_dropout": 0.5, "renormalise": True}, num_experts=4, top_k=3)
    routing, _, _ = call(router, torch.randn(300, 12), is_training=True)
    is_empty_TK = routing.expert_TK == routing.empty_id
    assert is_empty_TK.any()
    assert not routing.weight_TK[is_empty_TK].any()
    torch.testing.assert_close(routing.weight_TK.sum(dim=1), (~is_empty_TK).any(dim=1).float())


@pytest.mark.parametrize("name", ["sinkhorn", "base"])
@pytest.mark.parametrize("options", [{"num_groups": 4, "groups_kept": 2}, {"bias_rate": 1e-3}])
def test_routers_that_assign_in_training_refuse_what_that_ignores(name, options):
    with pytest.raises(ValueError, match=f"{name} balances by its assignment in training; leave num_groups and"):
        one(name, options, top_k=1)


@pytest.mark.parametrize("shape", [(2, 1), (1, 6), (6, 6), (3, 7), (3,)])
def test_a_logit_bias_of_another_shape_is_refused(shape, tiny_config):
    model = model_of(tiny_config, "olmoe")
    with pytest.raises(ValueError, match=r"logit_bias_LR must be floating point \(3, 6\)"):
        model(torch.randint(0, 96, (1, 4)), logit_bias_LR=torch.zeros(shape))


def test_a_logit_bias_must_be_floating_point_and_changes_no_dtype(tiny_config):
    model = model_of(tiny_config, "olmoe")
    token_BS = torch.randint(0, 96, (1, 4))
    with pytest.raises(ValueError, match=r"got torch.int64 \(3, 6\)"):
        model(token_BS, logit_bias_LR=torch.zeros(3, 6, dtype=torch.long))
    stats = model(token_BS, logit_bias_LR=torch.zeros(3, 6, dtype=torch.float64)).router_stats
    assert all(layer.kept.weight_TK.dtype == torch.float32 for layer in stats)


@pytest.mark.parametrize("router", ["soft_moe", "hash"])
def test_routers_without_logits_refuse_a_bias(router, tiny_config):
    with pytest.raises(ValueError, match="takes no logit bias: its experts are not chosen by logits"):
        model_of(tiny_config, router)(torch.randint(0, 96, (1, 4)), logit_bias_LR=torch.zeros(3, 6))


def test_buffers_loaded_in_double_precision_survive_a_cast(tiny_config, tmp_path):
    model = model_of(tiny_config, "deepseek_v3")
    for router in model.model.routers:
        router.bias_R.normal_()
    model.save_pretrained(tmp_path)
    wide = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).to(torch.bfloat16)
    for router, again in zip(model.model.routers, wide.model.routers, strict=True):
        assert torch.equal(again.bias_R.double(), router.bias_R.double())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rmoe", {"state_width": "8"}),
        ("rmoe", {"state_width": 8.0}),
        ("xmoe", {"projection_width": "8"}),
        ("xmoe", {"temperature": float("nan")}),
        ("expert_choice", {"mean_experts": "2"}),
        ("remoe", {"initial_penalty": "1"}),
        ("remoe", {"initial_penalty": float("nan")}),
        ("sigma_moe", {"expert_dropout": "0.1"}),
        ("soft_moe", {"slots_per_expert": 2.5}),
        ("hash", {"seed": "a"}),
        ("moepp", {"gating_residual": 1}),
        ("moepp", {"gate_layers": True}),
        ("longcat", {"target_load": "1"}),
        ("pregate", {"ahead": "1"}),
        ("pregate", {"inner": 5}),
        ("forced", {"row_by": 5}),
    ],
)
def test_options_of_the_wrong_type_are_named(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=rf"^{option} must be (a finite number|int|str|bool); got"):
        one(name, options, num_layers=2)


@pytest.mark.parametrize(
    "options", [{"kind": "x"}, {"sizes": 1}, {"taken": []}, {"layer": 0}, {"rule": {}}, {"cell": 1}]
)
@pytest.mark.parametrize("name", ["classic", "rmoe", "remoe", "pregate", "moepp"])
def test_inner_names_are_no_options(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"unknown router option '{option}'"):
        one(name, options)


@pytest.mark.parametrize(
    ("name", "misspelt", "meant"),
    [
        ("rmoe", "state_widht", "state_width"),
        ("moepp", "gating_residuel", "gating_residual"),
        ("rmoe", "scal", "scale"),
    ],
)
def test_misspelt_options_get_a_hint(name, misspelt, meant):
    with pytest.raises(ValueError, match=rf"unknown router option '{misspelt}' \(did you mean '{meant}'\?\)"):
        one(name, {misspelt: 8})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": None}, "unknown router None"),
        ({"balance_loss_weight": "a"}, "balance_loss_weight"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight"),
    ],
)
def test_bad_values_of_the_config_are_refused(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MoEConfig(**values)


def test_router_options_must_be_a_mapping():
    with pytest.raises(ValueError, match=r"router options must be names with values; got \['a'\]"):
        one("olmoe", ["a"])


def test_a_replayed_routing_has_whole_ids_each_once():
    router = one("forced", {"num_rows": 2})
    with pytest.raises(ValueError, match="expected int64 ids"):
        router.replay(torch.tensor([[0.5, 1.0], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="row 1 names an expert twice"):
        router.replay(torch.tensor([[0, 1], [3, 3]]))
    router.replay(torch.tensor([[0, 1], [8, 8]]))  # 8 is an empty slot
