"""Every causal router runs under offload.load with the same tokens and logits as the resident model."""

import pytest
import torch

import offload
from moe import MoEForCausalLM

CASES = {
    "mixtral": ("mixtral", {}, ()),
    "deepseek_v3": ("deepseek_v3", {"num_groups": 3, "groups_kept": 2}, ()),
    "adamoe": ("adamoe", {}, ("zero",) * 4),
    "longcat": ("longcat", {}, ("copy",) * 3),
    "moepp": ("moepp", {}, ("zero", "copy", "constant")),
    "rmoe": ("rmoe", {"state_width": 16}, ()),
    "pregate": ("pregate", {"ahead": 2}, ()),
    "pregate rmoe": ("pregate", {"inner": "rmoe"}, ()),
    "xmoe": ("xmoe", {}, ()),
    "sigma_moe": ("sigma_moe", {}, ()),
    "sinkhorn": ("sinkhorn", {}, ()),
    "hash": ("hash", {}, ()),
    "remoe": ("remoe", {}, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_offloaded_equals_resident(name, tiny_config, tmp_path):
    router, options, zero_compute = CASES[name]
    config = tiny_config(router=router, router_options=options, zero_compute_experts=zero_compute)
    resident = MoEForCausalLM(config).eval()
    resident.save_pretrained(tmp_path)
    loaded = offload.load(tmp_path, cache_experts=6 if router == "remoe" else 2)
    prompt = torch.randint(0, 96, (1, 6))
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = loaded.generate(prompt, **settings), resident.generate(prompt, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b)
