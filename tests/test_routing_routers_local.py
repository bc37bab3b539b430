"""Routers with a memory of the sequence: against naive loops with gradients, through caches, and what they refuse."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from moe import MoEForCausalLM
from routing import Carry, RouterSizes, RoutingContext, build_routers

T, D, E, K = 20, 8, 6, 2
SIZES = RouterSizes(width=D, num_experts=E, top_k=K, num_layers=1)


def build(name, sizes=SIZES, **options):
    (router,) = build_routers(name, sizes, options)
    router.init_parameters(1.0)
    return router.double()


def context_of(**fields):
    row_T = torch.arange(T) // 10
    return RoutingContext(sequence_T=row_T, position_T=torch.arange(T) % 10, **fields)


def naive(logit_TE, allowed):
    """[T, E] weights: a softmax over all experts, of which the best K allowed ones stay; one token after the other."""
    rows = []
    for t, logit_E in enumerate(logit_TE):
        probability_E = logit_E.exp() / logit_E.exp().sum()
        best = sorted(allowed[t], key=lambda e: -float(probability_E.detach()[e]))[:K]
        rows.append(torch.stack([probability_E[e] if e in best else probability_E[e] * 0 for e in range(E)]))
    return torch.stack(rows)


def resident_sets(logit_TE, residents, rank, admits):
    """Which experts each token of the two sequences may choose, by the rule in words."""
    allowed = []
    for start in (0, 10):
        held = None
        for logit_E in logit_TE[start : start + 10].tolist():
            found = held
            if held is None:
                held = set(sorted(range(E), key=lambda e: -logit_E[e])[:residents])
            else:
                worst, best = min(held, key=lambda e: logit_E[e]), max(set(range(E)) - held, key=lambda e: logit_E[e])
                if sum(logit_E[best] <= logit_E[e] for e in held) < rank:
                    held = (held - {worst}) | {best}
            allowed.append(held if admits == "now" or found is None else found)
    return allowed


def dense(routing):
    weight_TR = routing.weight_TK.new_zeros(len(routing.expert_TK), E + 1)
    return weight_TR.scatter_add(1, routing.expert_TK, routing.weight_TK)[:, :E]


def expect_gradients_of(routing, expected, leaves, tolerance):
    upstream = torch.randn(T, E).double()
    ours = torch.autograd.grad((dense(routing) * upstream).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("admits", ["now", "next"])
@pytest.mark.parametrize(("swaps", "rank"), [("chosen", K), ("better", 3)])
def test_resident_routing_and_its_gradients_are_those_of_a_loop(admits, swaps, rank, tolerance):
    router, x_TD = (
        build("resident", residents=3, admits=admits, swaps=swaps),
        torch.randn(T, D).double().requires_grad_(),
    )
    routing, _, stats = router(x_TD, Carry(), context_of(is_training=True))
    logit_TE = x_TD @ router.weight.T
    expected = naive(logit_TE, resident_sets(logit_TE.detach(), 3, rank, admits))
    torch.testing.assert_close(dense(routing), expected, **tolerance[torch.float64])
    expect_gradients_of(routing, expected, [x_TD, router.weight], tolerance[torch.float64])
    assert stats.probability_TR.shape == (T, E)


def test_all_experts_resident_is_the_router_without_residents():
    router, plain = build("resident", residents=E), build("olmoe")
    plain.load_state_dict(router.state_dict())
    x_TD = torch.randn(T, D).double()
    ours, theirs = (one(x_TD, Carry(), context_of())[0] for one in (router, plain))
    assert torch.equal(ours.expert_TK, theirs.expert_TK)
    assert torch.equal(ours.weight_TK, theirs.weight_TK)


@pytest.mark.parametrize(("name", "options"), [("resident", {"residents": 3}), ("pool", {"pool": 3})])
def test_calls_of_any_length_through_a_cache_choose_exactly_as_one(name, options):
    """Weights may differ in their last bits: products of several rows are not those of one."""
    router, x_TD = build(name, **options), torch.randn(10, D).double()
    position_T = torch.arange(10)
    whole, _, _ = router(x_TD, Carry(), RoutingContext(position_T=position_T, sequence_T=torch.zeros(10).long()))
    for lengths in ([1] * 10, [4, 1, 5], [9, 1]):
        cache, parts = DynamicCache(), []
        for x, position in zip(x_TD.split(lengths), position_T.split(lengths), strict=True):
            context = RoutingContext(position_T=position, sequence_T=torch.zeros_like(position), cache=cache)
            parts.append(router(x, Carry(), context)[0])
        assert torch.equal(torch.cat([part.expert_TK for part in parts]), whole.expert_TK)
        torch.testing.assert_close(torch.cat([part.weight_TK for part in parts]), whole.weight_TK)


@pytest.mark.parametrize(("name", "options"), [("resident", {"residents": 3}), ("pool", {"pool": 3})])
def test_a_cropped_and_a_reordered_cache_take_the_state_along(name, options, tiny_config):
    model = MoEForCausalLM(tiny_config(router=name, router_options=options)).double().eval()
    token_BS = torch.randint(96, (3, 9))
    with torch.no_grad():
        whole = model(token_BS).logits
        cache = model(token_BS[:, :8], use_cache=True).past_key_values
        cache.crop(-3)
        step = model(token_BS[:, 5:6], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole[:, 5])
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        step = model(token_BS[[2, 2, 0], 6:7], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole[[2, 2, 0], 6])


def test_a_documents_pool_holds_its_best_experts_and_no_others_are_chosen(tolerance):
    router, x_TD = build("pool", smallest=3, largest=3), torch.randn(T, D).double().requires_grad_()
    routing, _, _ = router(x_TD, Carry(), context_of(is_training=True))
    probability_TE = (x_TD @ router.weight.T).softmax(dim=-1)
    allowed = []
    for start in (0, 10):
        best = probability_TE[start : start + 10].sum(dim=0).topk(3).indices.tolist()
        allowed += [set(best)] * 10
    expected = naive(x_TD @ router.weight.T, allowed)
    torch.testing.assert_close(dense(routing), expected)
    expect_gradients_of(routing, expected, [x_TD, router.weight], tolerance[torch.float64])
    plain, _, _ = router(x_TD, Carry(), context_of())
    torch.testing.assert_close(dense(plain), naive(x_TD @ router.weight.T, [set(range(E))] * T))


def test_training_pools_have_every_size_and_padding_adds_nothing_to_the_sums():
    router, sizes = build("pool", smallest=2, largest=E), set()
    share_BSR = torch.rand(400, 1, E)
    sizes |= set(router._drawn(share_BSR).sum(dim=-1).flatten().tolist())
    assert sizes == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resident", {"residents": 7}, r"residents must lie in 1\.\.6"),
        ("resident", {"residents": 1}, "leave top_k = 2 choices"),
        ("resident", {"num_groups": 2}, "leave num_groups out"),
        ("resident", {"margin": -1.0}, "margin must be at least"),
        ("resident", {"admits": "later"}, "admits must be one of now, next"),
        ("pool", {"smallest": 1}, r"pools must hold 2 \(K\)"),
        ("pool", {"smallest": 5, "largest": 4}, "the smallest first"),
        ("pool", {"pool": 9}, "outside training"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_routers(name, SIZES, options)


def test_calls_without_a_sequence_of_their_own_are_refused(tiny_config):
    router = build("resident", residents=3)
    with pytest.raises(ValueError, match="two tokens at one position"):
        router(torch.randn(3, D).double(), Carry(), RoutingContext(position_T=torch.tensor([4, 4, 5])))
    model = MoEForCausalLM(tiny_config(router="resident")).eval()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticCache"):
        model(torch.randint(96, (1, 4)), past_key_values=cache)
    for architecture in ("chain_of_experts", "mixture_of_recursions"):
        options = {"shared_gate": True} if architecture == "chain_of_experts" else {"feed_forward": "moe"}
        with pytest.raises(ValueError, match="it keeps"):
            MoEForCausalLM(tiny_config(router="pool", architecture=architecture, architecture_options=options))
