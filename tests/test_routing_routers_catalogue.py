"""What a row of ROUTERS says: options, operations, sources; and that nothing beside the table names a router."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import routing
from experiments.compare.measures.flops import router_flops
from experiments.variants.catalogue import VARIANTS, model_overrides
from moe import ARCHITECTURES, MoEForCausalLM
from routing import ROUTERS, ClassicRule, Options, RouterSizes, build_routers
from routing.routers.classic.rule import RULE_PARTS, Balance, Capacity, Grouping, Initial, Scoring
from routing.routers.options import read_options
from routing.routers.own_rules.fixed import HashOptions

ROOT = Path(__file__).parent.parent
SIZES = RouterSizes(width=8, num_experts=6, top_k=2, num_layers=2, vocab_size=96)
# operations of the routers of a model of width 32 with 3 layers of 6 experts, as they were counted by parameter names
FLOPS = dict.fromkeys(ROUTERS, 1152.0) | {
    "hash": 0.0,
    "forced": 0.0,
    "rmoe": 619008.0,
    "xmoe": 58368.0,
    "adamoe": 1920.0,
    "longcat": 1728.0,
    "moepp": 2320.0,
    "soft_moe": 9216.0,
}
OTHER_FLOPS = [
    ({"architecture": "peer", **ARCHITECTURES["peer"].example}, 3888.0),
    ({"architecture": "ultramem", **ARCHITECTURES["ultramem"].example}, 3828.0),
    ({"architecture": "readme", **ARCHITECTURES["readme"].example}, 3392.0),
    ({"architecture": "duo_llm", "architecture_options": {"small_width": 8, "skip": True}}, 576.0),
    ({"architecture": "chain_of_experts"}, 2304.0),
    ({"architecture": "mode", "router": "qwen3_moe"}, 14592.0),
    ({"architecture": "moex"}, 0.0),
    ({"router": "pregate", "router_options": {"inner": "rmoe", "inner_options": {"state_width": 16}}}, 12864.0),
]


def model_of(tiny_config, name):
    example = ROUTERS[name].example
    return MoEForCausalLM(
        tiny_config(
            router=name,
            router_options=dict(example.options),
            num_experts_per_tok=example.top_k,
            zero_compute_experts=example.zero_compute,
        )
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_operations_are_what_they_were(name, tiny_config):
    assert router_flops(model_of(tiny_config, name)) == FLOPS[name]


@pytest.mark.parametrize(("overrides", "expected"), OTHER_FLOPS)
def test_operations_of_other_routers_are_what_they_were(overrides, expected, tiny_config):
    assert router_flops(MoEForCausalLM(tiny_config(**overrides))) == expected


def test_a_cell_that_layers_share_is_passed_as_often_as_each_of_them(tiny_config):
    model = MoEForCausalLM(tiny_config(router="rmoe", router_options={"state_width": 8}))
    own, cell = 2 * (8 * 32 + 6 * 8), 2 * 6 * 8 * 8
    assert router_flops(model, [1.0, 2.0, 0.5]) == 3.5 * (own + cell)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_option_is_a_field_of_one_frozen_group_and_documented(name):
    groups = ROUTERS[name].kind.option_groups
    names = [field.name for group in groups for field in fields(group)]
    assert len(set(names)) == len(names)
    for group in groups:
        assert issubclass(group, Options)
        assert group.__dataclass_params__.frozen
        for field in fields(group):
            assert re.search(rf"^ +{field.name}: ", group.__doc__, flags=re.MULTILINE), f"{group.__name__}.{field.name}"
    assert ROUTERS[name].defaults.keys() <= set(names)


def test_a_row_is_called_with_sizes_and_options():
    (first, second) = ROUTERS["xmoe"](SIZES, projection_width=4, scale=2.0)
    assert (first.layer, second.layer) == (0, 1)
    assert first.projection.shape == (4, 8)
    assert first.rule == ClassicRule(scoring=Scoring(scale=2.0))


def test_options_of_a_rule_are_flat_in_a_config_and_parted_in_code():
    options = {
        "score": "sigmoid",
        "renormalise": True,
        "scale": 2.5,
        "num_groups": 3,
        "groups_kept": 2,
        "group_score": "top2",
        "bias_rate": 1e-3,
        "balance_loss": "sequence",
        "capacity_factor": 1.5,
        "capacity_policy": "weight",
        "init": "truncated",
        "init_cut": 3.0,
    }
    rule = build_routers("classic", SIZES, options)[0].rule
    assert rule == ClassicRule(
        scoring=Scoring(score="sigmoid", renormalise=True, scale=2.5),
        grouping=Grouping(num_groups=3, groups_kept=2, group_score="top2"),
        balance=Balance(bias_rate=1e-3, balance_loss="sequence"),
        capacity=Capacity(capacity_factor=1.5, capacity_policy="weight"),
        initial=Initial(init="truncated", init_cut=3.0),
    )
    assert rule == ClassicRule.of(**options)
    old = "score renormalise normalise_over scale num_groups groups_kept group_score bias_rate target_load "
    old += (
        "capacity_factor capacity_rule capacity_policy renormalise_kept ffn_share jitter balance_loss init init_scale "
    )
    old += "init_cut null_copy_noise"
    assert {field.name for part in RULE_PARTS for field in fields(part)} == set(old.split())


def test_parts_of_a_rule_check_themselves():
    with pytest.raises(ValueError, match="score must be one of softmax"):
        Scoring(score="tanh")
    with pytest.raises(ValueError, match=r"groups_kept must lie in 1\.\.2"):
        Grouping(num_groups=2, groups_kept=3)
    with pytest.raises(ValueError, match=r"unknown router option 'scal' \(did you mean 'scale'\?\); there are .*seed"):
        read_options([Scoring, HashOptions], {"scal": 1.0})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moepp", {"gating_residual": False, "gate_layers": 2}, "set gating_residual"),
        ("deepseek_v2", {"device_weight": 0.05}, "give num_groups above 1"),
        ("expert_choice", {"score": "sigmoid"}, "its only option is mean_experts"),
        ("hash", {"scale": 1.0}, "unknown router option 'scale'; there are seed"),
        ("rmoe", {"recurrence": "half"}, "recurrence must be one of full, detach, none; got 'half'"),
        ("forced", {"num_rows": 0}, "num_rows must be at least 1; got 0"),
    ],
)
def test_options_that_do_not_fit_a_router_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_routers(name, SIZES, options)


def test_a_default_that_follows_from_the_sizes_stands_in_for_none():
    sizes = RouterSizes(width=8, num_experts=6, top_k=3, num_layers=1, zero_compute=("copy",) * 3)
    for options in ({}, {"target_load": None}):
        assert build_routers("longcat", sizes, options)[0].rule.balance.target_load == 2.0
    assert build_routers("longcat", sizes, {"target_load": 1.5})[0].rule.balance.target_load == 1.5


def test_comparisons_take_the_published_coefficient_from_the_row():
    for variant, router in (("deepseek-v2", "deepseek_v2"), ("deepseek-v3", "deepseek_v3"), ("sigma-moe", "sigma_moe")):
        expected = {"deepseek_v2": 0.003, "deepseek_v3": 1e-4, "sigma_moe": 1e-3}[router]
        assert ROUTERS[router].balance_weight == expected
        assert model_overrides(variant, {})["balance_loss_weight"] == expected
        assert model_overrides(router, {})["balance_loss_weight"] == expected
    assert "balance_loss_weight" not in model_overrides("top2", {})
    assert model_overrides("peer", {"num_experts": 16})["num_experts"] != 16, "a variant goes before an architecture"
    assert model_overrides("moex", {}) == {"architecture": "moex"}
    assert not set(VARIANTS) & set(ARCHITECTURES)


def test_the_table_in_the_docs_has_every_router_with_its_source():
    page = (ROOT / "docs/routers.md").read_text(encoding="utf-8")
    section = page.split("## The catalogue")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, flags=re.MULTILINE))
    assert list(rows) == list(ROUTERS)
    number = r"\d{4}\.\d{4,5}"
    for name, source in rows.items():
        assert re.findall(number, source) == re.findall(number, ROUTERS[name].source), name


def test_the_docs_describe_every_architecture():
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if not re.search(rf"`(architecture: )?{name}`", page)] == []
    sources = re.findall(r"\d{4}\.\d{5}", " ".join(row.source for row in ARCHITECTURES.values()))
    assert [source for source in sources if source not in page and source != "1701.06538"] == []


def test_everything_that_the_root_offers_is_there_once():
    names = routing.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(routing, name).__class__ is not type(None)
    assert set(names) <= set(dir(routing))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = routing.Nothing


def test_no_router_is_forgotten_by_a_checkpoint_in_half_precision(tiny_config):
    """Every floating-point buffer of every router stays as it is."""
    for name in ROUTERS:
        model = model_of(tiny_config, name).to(torch.bfloat16)
        assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float32}
