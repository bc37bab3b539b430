"""What every router keeps, whatever its rule: the contract, tested through the routers and through the whole model."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from experiments.evidence.resident import load_resident
from moe import MoEForCausalLM
from routing import ROUTERS, Router, RouterSizes, RoutingContext, build_routers
from routing.routers.own_rules.fixed import ForcedRouter

T, D, E, K, L = 24, 8, 6, 2, 3


@dataclass(frozen=True)
class Case:
    """One router as a model would use it."""

    router: str
    options: dict[str, Any] = field(default_factory=dict)
    top_k: int = K
    zero_compute: tuple[str, ...] = ()


def case_of(name):
    """The use of a router that its row in `ROUTERS` gives as an example."""
    example = ROUTERS[name].example
    return Case(name, dict(example.options), example.top_k, example.zero_compute)


NULLS = ("zero", "copy", "constant", "zero")
NO_ROUTING = {"soft_moe"}  # mixes instead of routing; tests/test_routing_routers_soft.py

CASES = {name: case_of(name) for name in sorted(ROUTERS.keys() - NO_ROUTING)} | {
    "sinkhorn top-1": Case("sinkhorn", top_k=1),
    "deepseek_v3 groups": Case("deepseek_v3", {"num_groups": 3, "groups_kept": 2}),
    "adamoe over all": Case("adamoe", {"normalise_over": "selected"}, top_k=3, zero_compute=("zero",) * 4),
    "rmoe detached": Case("rmoe", {"recurrence": "detach", "state_width": 16}),
    "rmoe without recurrence": Case("rmoe", {"recurrence": "none", "state_width": 16}),
    "pregate 2": Case("pregate", {"ahead": 2, "inner": "deepseek_v3"}),
    "pregate rmoe with nulls": Case(
        "pregate",
        {"inner": "rmoe", "inner_options": {"normalise_over": "ffn", "balance_loss": "null_averaged"}},
        top_k=3,
        zero_compute=("zero",) * 4,
    ),
    "pregate moepp": Case("pregate", {"inner": "moepp"}, zero_compute=NULLS),
    "pregate remoe": Case("pregate", {"inner": "remoe"}),
    "resident next": Case("resident", {"residents": 3, "admits": "next", "margin": 0.01}),
    "resident beside nulls": Case(
        "resident", {"residents": 2, "score": "sigmoid", "bias_rate": 0.1}, top_k=3, zero_compute=("zero", "copy")
    ),
    "pregate resident": Case("pregate", {"inner": "resident", "inner_options": {"residents": 3}}),
}


# through the whole model, one of those that differ by their rule alone stands for the others
SAME_CODE = {"olmoe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "loss_free", "sinkhorn top-1"}
SAME_CODE |= {"adamoe over all", "rmoe detached", "resident beside nulls", "quantile"}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[name for name in CASES if name not in SAME_CODE])
def model_case(request):
    return CASES[request.param]


def build(case, dtype=torch.float64):
    sizes = RouterSizes(
        width=D, num_experts=E, top_k=case.top_k, num_layers=L, zero_compute=case.zero_compute, vocab_size=96
    )
    routers = build_routers(case.router, sizes, case.options)
    for router in routers:
        for module in router.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters(0.5)
        router.to(dtype)
        force(router)
    return routers


def force(router):
    """Give a forced router something to replay."""
    if isinstance(router, ForcedRouter):
        router.replay(torch.stack([torch.randperm(E)[:K] for _ in range(len(router.expert_PK))]))


def context_of(num_tokens=T, **fields):
    token_id_T = torch.arange(num_tokens) * 7 % 96
    sequence_T, position_T = torch.arange(num_tokens) // 8, torch.arange(num_tokens) % 8
    return RoutingContext(**({"token_id_T": token_id_T, "position_T": position_T, "sequence_T": sequence_T} | fields))


def permuted(context, order):
    return RoutingContext(
        token_id_T=context.token_id_T[order],
        position_T=context.position_T[order],
        sequence_T=context.sequence_T[order],
    )


def run_layers(routers, x_LTD, context):
    """Routing and statistics of each layer, with the carry handed on."""
    carry, results = routers[0].begin(context), []
    for router, x_TD in zip(routers, x_LTD, strict=True):
        routing, carry, stats = router(x_TD, carry, context)
        results.append((routing.validate(), stats))
    return results


def model_of(tiny_config, case, **overrides):
    config = tiny_config(
        router=case.router,
        router_options=case.options,
        num_experts_per_tok=case.top_k,
        zero_compute_experts=case.zero_compute,
        **overrides,
    )
    model = MoEForCausalLM(config)
    for layer in model.model.moe_layers:
        force(layer.router)
    return model


@pytest.mark.parametrize("is_training", [False, True])
def test_counts_are_those_of_the_ids(case, is_training):
    routers = build(case)
    assert all(isinstance(router, Router) and router.flops() >= 0 for router in routers)
    for routing, stats in run_layers(routers, torch.randn(L, T, D).double(), context_of(is_training=is_training)):
        assert routing.weight_TK.isfinite().all()
        counted_R = [(routing.expert_TK == r).sum().item() for r in range(routing.num_routable)]
        assert stats.kept_R.tolist() == counted_R
        assert (stats.kept_R <= stats.count_R).all()
        assert stats.num_tokens == T
        torch.testing.assert_close(stats.probability_TR.sum(dim=1).double(), torch.ones(T, dtype=torch.float64))
        for experts in routing.expert_TK.tolist():
            real = [e for e in experts if e != routing.empty_id]
            assert len(set(real)) == len(real), "no expert twice"


def test_permuting_tokens_permutes_the_routing(case):
    routers, x_LTD, order = build(case), torch.randn(L, T, D).double(), torch.randperm(T)
    context = context_of()
    straight = run_layers(routers, x_LTD, context)
    shuffled = run_layers(routers, x_LTD[:, order], permuted(context, order))
    for (routing, _), (other, _) in zip(straight, shuffled, strict=True):
        assert torch.equal(routing.expert_TK[order], other.expert_TK)
        torch.testing.assert_close(routing.weight_TK[order], other.weight_TK)


def test_trap_recomputing_a_forward_pass_counts_nothing_twice(case):
    """Activation checkpointing runs a forward pass again: state may change in post_step only, and only in training."""
    routers, x_LTD = build(case), torch.randn(L, T, D).double()
    before = [{name: buffer.clone() for name, buffer in router.named_buffers()} for router in routers]
    for is_training in (True, False, True):
        run_layers(routers, x_LTD, context_of(is_training=is_training))
    for router, buffers in zip(routers, before, strict=True):
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in router.named_buffers())


def test_padding_changes_nothing_for_the_other_tokens(case):
    routers, x_LTD = build(case), torch.randn(L, T, D).double()
    valid_T = torch.arange(T) % 5 != 0
    context = context_of()
    alone = run_layers(routers, x_LTD[:, valid_T], permuted(context, valid_T))
    padded = run_layers(routers, x_LTD, context_of(is_valid_T=valid_T))
    for (routing, stats), (other, other_stats) in zip(alone, padded, strict=True):
        assert (other.expert_TK[~valid_T] == other.empty_id).all()
        torch.testing.assert_close(dense(routing), dense(other)[valid_T])
        assert torch.equal(stats.count_R, other_stats.count_R)
        torch.testing.assert_close(stats.probability_R, other_stats.probability_R)
        assert stats.num_tokens == other_stats.num_tokens == int(valid_T.sum())


def dense(routing):
    """[T, R + 1] weights by expert, whatever the order and number of slots."""
    weight_TR = routing.weight_TK.new_zeros(len(routing.expert_TK), routing.num_routable + 1)
    return weight_TR.scatter_add(1, routing.expert_TK, routing.weight_TK)


def test_one_token_at_a_time_equals_all_at_once(case):
    routers, x_LTD = build(case), torch.randn(L, T, D).double()
    if not all(router.is_causal for router in routers):
        pytest.skip("not causal")
    context = context_of()
    together = run_layers(routers, x_LTD, context)
    caches = [DynamicCache() for _ in range(T // 8)]  # what a router must know of each sequence
    for t in range(T):
        of_token = replace(permuted(context, torch.tensor([t])), cache=caches[t // 8])
        alone = run_layers(routers, x_LTD[:, t : t + 1], of_token)
        for (routing, _), (other, _) in zip(together, alone, strict=True):
            torch.testing.assert_close(dense(routing)[t : t + 1], dense(other))


def test_generate_equals_prefill_column_by_column(model_case, tiny_config):
    model = model_of(tiny_config, model_case).double().eval()
    prompt = torch.randint(0, 96, (2, 7))
    if not all(layer.router.is_causal for layer in model.model.moe_layers):
        with pytest.raises(ValueError, match="causal"):
            model.generate(prompt, max_new_tokens=2)
        return
    made = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        prefill = model(made.sequences).logits
    for step, logits in enumerate(made.logits):
        torch.testing.assert_close(logits.double(), prefill[:, 6 + step].float().double(), atol=1e-5, rtol=1e-5)


def test_left_padding_does_not_change_what_is_generated(model_case, tiny_config):
    model = model_of(tiny_config, model_case).double().eval()
    if not all(layer.router.is_causal for layer in model.model.moe_layers):
        pytest.skip("not causal")
    prompt = torch.randint(0, 96, (1, 7))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    settings = {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(prompt, **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], plain)


def test_checkpoint_keeps_everything_and_buffers_exactly_in_bfloat16(model_case, tiny_config, tmp_path):
    model = model_of(tiny_config, model_case).train()
    token_BS = torch.randint(0, 96, (2, 16))
    output = model(token_BS, labels=token_BS)
    output.loss.backward()
    model.model.post_step(torch.stack([stats.count_R for stats in output.router_stats]), token_BS.numel())
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    for buffer in buffers.values():
        buffer += 1.0009765625  # more bits than bfloat16 has
    model.save_pretrained(tmp_path)

    loaded = load_resident(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(model.eval()(token_BS).logits, loaded.eval()(token_BS).logits)

    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = dict(small.named_buffers())
    for name, buffer in buffers.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], buffer), name
    stats = small.train()(token_BS, labels=token_BS).router_stats
    assert all(layer.probability_TR.dtype == torch.float32 for layer in stats)


def test_training_reaches_every_router_parameter(model_case, tiny_config):
    """Through the language-model loss or the auxiliary losses, nothing is left without a gradient."""
    model = model_of(tiny_config, model_case, balance_loss_weight=0.1).train()
    token_BS = torch.randint(0, 96, (2, 16))
    model(token_BS, labels=token_BS).loss.backward()
    for name, parameter in model.named_parameters():
        # without recurrence the previous state is 0, and so is the gradient of the matrix that reads it
        if ".router." in name and not (model_case is CASES["rmoe without recurrence"] and "weight_hh" in name):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
