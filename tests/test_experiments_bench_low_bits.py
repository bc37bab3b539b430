"""The comparison of low-bit forms: its cases, what it concludes, and llama.cpp's quantisers where they are there."""

import pytest
import torch

from experiments.bench.low_bits.cases import CASES, chosen
from experiments.bench.low_bits.k_quants import rounded, type_for
from experiments.bench.low_bits.verdicts import verdicts


def test_cases_have_names_of_their_own_and_depths_share_a_copy():
    assert len({case.name for case in CASES}) == len(CASES)
    planes = chosen(["planes.levels.3", "planes.levels.1"])
    assert [case.depth for case in planes] == [1, 3]
    assert {case.stored for case in planes} == {"planes.levels"}
    assert [case.stored for case in chosen(["mixed-3.5.gptq"])] == ["mixed-3.5.gptq"]
    assert chosen(None) == CASES
    with pytest.raises(ValueError, match=r"unknown case 'int4.gptc' \(did you mean 'int4.gptq'\?\)"):
        chosen(["int4.gptc"])


def rows(**of):
    """Bits and a divergence for each seed, by case with `_` in place of `-` and `.`."""
    names = {case.name.replace("-", "_").replace(".", "_"): case.name for case in CASES}
    return [
        {"case": names[key], "seed": seed, "bits": bits, "divergence": divergence}
        for key, (bits, *divergences) in of.items()
        for seed, divergence in enumerate(divergences)
    ]


def test_a_mixture_is_compared_with_the_line_between_its_forms():
    found = verdicts(rows(int3_gptq=(3.25, 8.0, 4.0), int4_gptq=(4.25, 2.0, 2.0), mixed_3_5_gptq=(3.5, 6.5, 1.75)))
    # a quarter of the way: 0.75 * 8 + 0.25 * 2 = 6.5 and 0.75 * 4 + 0.25 * 2 = 3.5
    assert [(verdict.winner, verdict.ratios) for verdict in found] == [("mixed-3.5.gptq", (1.0, 0.5))]


def test_theirs_are_compared_with_the_best_of_ours_of_no_more_bits():
    found = verdicts(
        rows(
            int4_gptq=(4.25, 2.0, 4.0),
            int4_hqq=(4.375, 1.0, 1.0),
            int8_rtn=(8.25, 0.1, 0.1),
            q4_k_ggml=(4.5, 2.0, 4.0),
            q2_k_ggml=(2.625, 9.0, 9.0),
        )
    )
    assert [(verdict.winner, verdict.ratios) for verdict in found] == [("int4.hqq", (0.5, 0.25))]


@pytest.mark.parametrize(
    ("form", "columns", "kind"),
    [("q4_k", 512, "q4_k"), ("q4_k", 576, "q5_0"), ("q2_k", 576, "iq4_nl"), ("q6_k", 96, "q8_0"), ("q8_0", 96, "q8_0")],
)
def test_rows_that_blocks_of_256_do_not_divide_get_what_llama_cpp_takes(form, columns, kind):
    assert type_for(form, columns) == kind


def test_their_quantisers_round_to_the_grid_and_weigh_columns():
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    # the largest is 127, so that the scale is 1
    grid_OC = torch.arange(-127.0, -95.0)[None]
    found_OC, nbytes = rounded(grid_OC, "q8_0", None)
    assert nbytes == 34
    assert torch.equal(found_OC, grid_OC)
    w_OC = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    importance_C = torch.logspace(-3, 3, 512)
    alike_OC, nbytes = rounded(w_OC, "q4_k", None)
    weighed_OC, _ = rounded(w_OC, "q4_k", importance_C)
    assert nbytes == 64 * 512 * 4.5 / 8
    costs = [float(((found - w_OC).square() * importance_C).sum()) for found in (weighed_OC, alike_OC)]
    assert costs[0] < costs[1]
    assert float((alike_OC - w_OC).square().mean()) < 0.01
