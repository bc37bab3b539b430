"""CLAIMS: every claim that can be tried, by the name that the command takes."""

from .claim import Claim, Expected
from .from_scratch.equal_compute import EIGHT, memory_rows
from .from_scratch.every_row import architecture_rows, router_rows
from .from_scratch.paths import decentralised_rows, mode_rows
from .from_scratch.series import time_moe_rows
from .from_scratch.sparse_units import AUTOENCODER, DENSE, moex_rows
from .from_scratch.two_modalities import mixture_of_transformers_rows
from .from_scratch.unequal_members import hdee_rows
from .from_scratch.whole_sequence import CHOOSE_TWO, whole_sequence_rows
from .on_trained.adapters import glider_rows
from .on_trained.converted import AS_IT_IS, null_rows, rank_rows, read_me_rows
from .on_trained.left_out import exit_rows, skip_rows
from .on_trained.pruned_by_prompt import IMPORTANT, NO_TRANSPORT, ONE_LEARNED, ROUTED, prompt_rows
from .on_trained.rewired import AS_TRAINED, SELECTIONS, rewired_rows
from .on_trained.shapes import APART, CHOSEN, EVENLY, ONE_ADAPTER, THE_MODEL, TUNED, UNBALANCED, shape_rows
from .on_trained.shards import LORA, WIDE_LORA, WITHOUT, shard_rows
from .on_trained.smollm2 import BY_BLENDS, BY_DOMAIN, WHOLE, smollm2_rows
from .on_trained.smollm2 import TUNED as WHOLE_TUNED

NO_LOSS = 0.02
"""Bits per byte that count as none: about one percent of what these models reach. Stated before any run."""

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
            Expected(variant="mixture of shards", against=WIDE_LORA, measure="bits_mean", by=-NO_LOSS),
            *(Expected(variant="mixture of shards", against=name, measure="bits_mean") for name in WITHOUT),
        ),
    ),
    "moe-x": Claim(
        question="Are MoE-X's units sparser and easier to read than dense ones and an autoencoder's, at no loss?",
        source="Yang et al. 2025 (MoE-X), arXiv:2503.07639",
        run=moex_rows,
        steps=300,
        expected=(
            Expected(variant="moe-x", against=DENSE, measure="byte_coverage", better="higher"),
            Expected(variant="moe-x", against=AUTOENCODER, measure="byte_coverage", better="higher"),
            Expected(variant="moe-x", against="dense ReLU", measure="active_hidden"),
            Expected(variant="moe-x", against=DENSE, measure="bits_per_byte"),
            Expected(variant="moe-x", against="top-2 SwiGLU", measure="bits_per_byte", by=-NO_LOSS),
        ),
    ),
    "latent-ranks": Claim(
        question="Which rank of latent experts keeps a trained mixture's loss, at once and after some training?",
        source="MoLE 2025, arXiv:2503.23100",
        run=rank_rows,
        steps=150,
        expected=(
            Expected(variant="rank 24", against=AS_IT_IS, measure="bits_converted", by=-NO_LOSS),
            Expected(variant="rank 24", against=AS_IT_IS, measure="bits_tuned", by=-NO_LOSS),
            Expected(variant="rank 12", against=AS_IT_IS, measure="bits_tuned", by=-NO_LOSS),
        ),
    ),
    "null-experts": Claim(
        question="Can null experts in a trained mixture save experts per token at no loss?",
        source="Zeng et al. 2024 (AdaMoE), arXiv:2406.13233",
        run=null_rows,
        steps=150,
        expected=(
            Expected(variant="nulls, 3 choices", against=AS_IT_IS, measure="experts_per_token", by=0.1),
            Expected(variant="nulls, 3 choices", against=AS_IT_IS, measure="bits_tuned", by=-NO_LOSS),
            Expected(variant="nulls, 3 choices", against="1 expert instead of 2", measure="bits_tuned"),
        ),
    ),
    "read-me": Claim(
        question="Do experts cut from a dense model by domain beat a dense one of their active width?",
        source="Cai et al. 2024 (Read-ME), arXiv:2410.19123",
        run=read_me_rows,
        steps=100,
        expected=(
            Expected(variant="cut by domain", against="dense, half width", measure="bits_mean"),
            Expected(variant="cut by domain", against="cut by blends", measure="bits_mean"),
            Expected(variant="cut by domain", against="dense, all channels", measure="bits_mean", by=-NO_LOSS),
        ),
    ),
    "read-me-smollm2": Claim(
        question="Do experts cut from SmolLM2-135M by domain, half of it per token, equal it after little tuning?",
        source="Cai et al. 2024 (Read-ME), arXiv:2410.19123",
        run=smollm2_rows,
        steps=20,
        expected=(
            Expected(variant=BY_DOMAIN, against=BY_BLENDS, measure="bits_mean"),
            Expected(variant=BY_DOMAIN, against=WHOLE, measure="bits_mean", by=-NO_LOSS),
            Expected(variant=BY_DOMAIN, against=WHOLE_TUNED, measure="bits_mean", by=-NO_LOSS),
        ),
    ),
    "rewiring": Claim(
        question="Do router offsets that are fitted to a context lower the loss of the bytes after it?",
        source="Su et al. 2025 (Rewiring), arXiv:2510.14853",
        run=rewired_rows,
        steps=300,
        expected=tuple(
            Expected(variant=f"rewired, {name}", against=AS_TRAINED, measure=measure)
            for measure in ("bits_seen", "bits_unseen")
            for name in SELECTIONS
        ),
    ),
    "memory-parity": Claim(
        question="Do memory layers reach a mixture of eight experts per token at equal operations and parameters?",
        source="UltraMemV2 2025, arXiv:2508.18756; PEER, He 2024, arXiv:2407.04153",
        run=memory_rows,
        steps=300,
        expected=(
            Expected(variant="ultramem", against=EIGHT, measure="bits_mean", by=-NO_LOSS),
            Expected(variant="peer", against=EIGHT, measure="bits_mean", by=-NO_LOSS),
            Expected(variant="peer", against="dense", measure="bits_mean"),
            Expected(variant="ultramem", against="dense", measure="bits_mean"),
        ),
    ),
    "whole-sequence": Claim(
        question="Do routers that see a whole sequence beat tokens' own choices at equal operations?",
        source="Puigcerver et al. 2023 (Soft MoE), arXiv:2308.00951; Zhou et al. 2022, arXiv:2202.09368",
        run=whole_sequence_rows,
        steps=400,
        expected=(
            Expected(variant="soft slots", against=CHOOSE_TWO, measure="loss"),
            Expected(variant="experts choose", against=CHOOSE_TWO, measure="loss"),
            Expected(variant="soft slots", against="experts choose", measure="loss"),
            Expected(variant="soft slots", against="dense", measure="loss"),
        ),
    ),
    "prompt-pruning": Claim(
        question="Do subnets that prompts choose beat one subnet for all, at the same share of operations?",
        source="Ganjdanesh et al. 2025 (APTP), arXiv:2406.12042",
        run=prompt_rows,
        steps=120,
        expected=(
            Expected(variant=ROUTED, against=ONE_LEARNED, measure="bits_per_byte"),
            Expected(variant=ROUTED, against=IMPORTANT, measure="bits_per_byte"),
            Expected(variant=ROUTED, against=NO_TRANSPORT, measure="bits_per_byte"),
            Expected(variant=ROUTED, against=NO_TRANSPORT, measure="codes_used", better="higher"),
        ),
    ),
    "shapes": Claim(
        question="Does one tuning of adapters by shape serve subnets of every depth and width?",
        source="Fu et al. 2024 (AmoebaLLM), arXiv:2411.10606",
        run=shape_rows,
        steps=80,
        expected=(
            Expected(variant=CHOSEN, against=EVENLY, measure="bits_mean"),
            Expected(variant=TUNED, against=CHOSEN, measure="bits_mean"),
            Expected(variant=TUNED, against=ONE_ADAPTER, measure="bits_mean"),
            Expected(variant=TUNED, against=UNBALANCED, measure="bits_mean"),
            Expected(variant=TUNED, against=THE_MODEL, measure="bits_full", by=-NO_LOSS),
            Expected(variant=TUNED, against=APART, measure="bits_mean", by=-NO_LOSS),
        ),
    ),
}
