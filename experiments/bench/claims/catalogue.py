"""CLAIMS: every claim that can be tried, by the name that the command takes."""

from .claim import Claim, Expected
from .from_scratch.every_row import architecture_rows, router_rows
from .from_scratch.paths import decentralised_rows, mode_rows
from .from_scratch.series import time_moe_rows
from .from_scratch.two_modalities import mixture_of_transformers_rows
from .from_scratch.unequal_members import hdee_rows
from .on_trained.adapters import glider_rows
from .on_trained.left_out import exit_rows, skip_rows
from .on_trained.shards import LORA, WIDE_LORA, WITHOUT, shard_rows

# in the order in which `--help` lists them
CLAIMS: dict[str, Claim] = {
    "architectures": Claim(
        question="Does every architecture learn, by the example of its row? Not at equal operations, so no ranking.",
        source="the sources of `ARCHITECTURES`",
        run=architecture_rows,
        steps=60,
    ),
    "routers": Claim(
        question="Does every router learn and keep its experts in use? Not at equal operations, so no ranking.",
        source="the sources of `ROUTERS`",
        run=router_rows,
        steps=60,
    ),
    "mode": Claim(
        question="Do experts that the noise level chooses denoise as well as token-routed or dense ones?",
        source="Reuss et al. 2024, arXiv:2412.12953",
        run=mode_rows,
        steps=400,
    ),
    "decentralised": Claim(
        question="Do denoisers of parts of the data, trained apart, equal one of all data at the same steps in all?",
        source="McAllister et al. 2025, arXiv:2501.05450",
        run=decentralised_rows,
        steps=400,
    ),
    "time-moe": Claim(
        question="Does a sparse forecaster beat a dense one of the same active size?",
        source="Shi et al. 2024, arXiv:2409.16040",
        run=time_moe_rows,
        steps=200,
    ),
    "mixture-of-transformers": Claim(
        question="Do weights by modality beat shared ones at the same operations per token?",
        source="Liang et al. 2024, arXiv:2411.04996",
        run=mixture_of_transformers_rows,
        steps=200,
    ),
    "hdee": Claim(
        question="Do members of unequal size or steps beat equal ones at the same training compute?",
        source="HDEE 2025, arXiv:2502.19385",
        run=hdee_rows,
        steps=150,
    ),
    "glider": Claim(
        question="Does a bias from the task's text help held-in tasks and keep local gates' held-out quality?",
        source="Li et al. 2024, arXiv:2410.07172",
        run=glider_rows,
        steps=150,
    ),
    "skip-ffn": Claim(
        question="How many feed-forwards can decoding leave out before it costs bits per byte?",
        source="Jaiswal et al. 2024 (FFN-SkipLLM), arXiv:2404.03865",
        run=skip_rows,
        steps=400,
    ),
    "early-exit": Claim(
        question="How many layers can decoding leave out before it costs bits per byte?",
        source="Tang et al. 2022 (MuE), arXiv:2211.11152",
        run=exit_rows,
        steps=400,
    ),
    "mixture-of-shards": Claim(
        question="Do adapters put together from shared shards beat LoRA with as many trained numbers?",
        source="Wang et al. 2024 (MoS), arXiv:2410.00938",
        run=shard_rows,
        steps=80,
        expected=(
            Expected(variant="mixture of shards", against=LORA, measure="bits_mean"),
            Expected(variant="mixture of shards", against=WIDE_LORA, measure="bits_mean", by=-0.02),
            *(Expected(variant="mixture of shards", against=name, measure="bits_mean") for name in WITHOUT),
        ),
    ),
}
