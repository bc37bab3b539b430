"""Architectures that change more than the router, one per file, and the literal dict that names them."""

from routing.ground.expect import expect_name

from ..parts.config import MoEConfig
from .body import Architecture, Body
from .chain import chain_of_experts
from .duo import duo_llm
from .feature_groups import feature_groups
from .latent import latent
from .layer_kinds.autonomous import autonomous
from .layer_kinds.dense_mixer import dense_mixer
from .layer_kinds.narrow import latent_moe
from .layer_kinds.ngram_tables import engram
from .lookups.memoryformer import memoryformer
from .lookups.tokenformer import tokenformer
from .memory.peer import peer
from .memory.ultramem import ultramem
from .mixture_of_transformers import mixture_of_transformers
from .moex import moex
from .plain import plain
from .read_me.architecture import readme
from .recursion.architecture import OPTIONS as RECURSION_OPTIONS
from .recursion.architecture import mixture_of_recursions
from .signals.glider import glider
from .signals.hydra import hydra
from .signals.mode import mode
from .time_moe import time_moe
from .whole_layer.late_sums import ladder, shortcut
from .whole_layer.parallel_streams import parallel_streams
from .whole_layer.routed_heads import routed_heads

# a small Read-ME: experts and permanent parts of another width in every layer
_READ_ME = {"expert_widths": [16, 8, 24], "permanent_widths": [8, 16, 0]}
_READ_ME |= {"router_width": 16, "router_heads": 2, "router_ffn": 12}

# the numbers below are sizes of small examples, which tests and docs build
ARCHITECTURES: dict[str, Architecture] = {
    "moe": Architecture(build=plain, source="Shazeer et al. 2017, arXiv:1701.06538"),
    "chain_of_experts": Architecture(
        build=chain_of_experts,
        source="Wang et al. 2025, arXiv:2506.18945",
        example={"num_shared_experts": 1, "balance_loss_weight": 0.1},
    ),
    "duo_llm": Architecture(
        build=duo_llm,
        source="Alizadeh et al. 2024, arXiv:2410.10846",
        example={"architecture_options": {"small_width": 8}},
    ),
    "feature_groups": Architecture(
        build=feature_groups,
        source="Chen et al. 2024, arXiv:2412.05644",
        example={"architecture_options": {"shared_width": 8}, "router": "mixtral"},
    ),
    "glider": Architecture(build=glider, source="Li et al. 2024, arXiv:2410.07172", example={"router": "qwen3_moe"}),
    "hydra": Architecture(
        build=hydra, source="Hydra 2025, arXiv:2508.15099", example={"architecture_options": {"chunk": 3}}
    ),
    "mixture_of_recursions": Architecture(
        build=mixture_of_recursions,
        source="Bae et al. 2025, arXiv:2507.10524",
        option_groups=RECURSION_OPTIONS,
        example={
            "architecture_options": {"feed_forward": "dense"},
            "num_hidden_layers": 4,
            "intermediate_size": 40,
        },
    ),
    "latent": Architecture(
        build=latent,
        source="Liu et al. 2025, arXiv:2503.23100",
        example={"architecture_options": {"group": 4, "rank": 5}, "router": "mixtral"},
    ),
    "readme": Architecture(
        build=readme,
        source="Cai et al. 2024, arXiv:2410.19123",
        example={"architecture_options": _READ_ME, "num_experts_per_tok": 1},
    ),
    "latent_moe": Architecture(
        build=latent_moe,
        source="NVIDIA 2026 (Nemotron 3)",
        example={"architecture_options": {"width": 12}, "num_shared_experts": 1, "router": "deepseek_v3"},
    ),
    "dense_mixer": Architecture(build=dense_mixer, source="Yao et al. 2025 (DenseMixer)"),
    "autonomous": Architecture(
        build=autonomous,
        source="Lv et al. 2025, arXiv:2501.13074",
        example={"architecture_options": {"rank": 6}},
    ),
    "engram": Architecture(
        build=engram,
        source="DeepSeek-AI 2026 (Engram)",
        example={"architecture_options": {"layers": [0, 2], "rows": 61, "width": 6, "heads": 2}},
    ),
    "moex": Architecture(build=moex, source="Yang et al. 2025, arXiv:2503.07639", example={"num_shared_experts": 1}),
    "mixture_of_transformers": Architecture(
        build=mixture_of_transformers,
        source="Liang et al. 2024, arXiv:2411.04996",
        example={
            "architecture_options": {"first_ids": [0, 30, 60]},
            "num_experts": 3,
            "num_experts_per_tok": 1,
        },
    ),
    "mode": Architecture(build=mode, source="Reuss et al. 2024, arXiv:2412.12953", example={"router": "qwen3_moe"}),
    "time_moe": Architecture(
        build=time_moe, source="Shi et al. 2024, arXiv:2409.16040", example={"num_shared_experts": 1}
    ),
    "ladder": Architecture(build=ladder, source="Zhang et al. 2025, arXiv:2501.06589"),
    "shortcut": Architecture(build=shortcut, source="Cai et al. 2024, arXiv:2404.05019"),
    "parallel_streams": Architecture(build=parallel_streams, source="Chen et al. 2025, arXiv:2505.10475"),
    "routed_heads": Architecture(
        build=routed_heads,
        source="Jin et al. 2024, arXiv:2410.11842; PVChat 2025, arXiv:2503.17069",
        example={
            "architecture_options": {"shared_heads": 2},
            "num_attention_heads": 8,
            "head_dim": 4,
            "router": "remoe",
        },
    ),
    "tokenformer": Architecture(build=tokenformer, source="Wang et al. 2024, arXiv:2410.23168"),
    "memoryformer": Architecture(build=memoryformer, source="Ding et al. 2024, arXiv:2411.12992"),
    "peer": Architecture(
        build=peer,
        source="He 2024, arXiv:2407.04153",
        example={
            "architecture_options": {"num_heads": 2, "key_width": 8},
            "num_experts": 49,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
        },
    ),
    "ultramem": Architecture(
        build=ultramem,
        source="Huang et al. 2025, arXiv:2508.18756; Huang et al. 2024, arXiv:2411.12364",
        example={
            "architecture_options": {
                "key_width": 8,
                "pre_value_width": 6,
                "value_width": 10,
                "layers_per_table": 2,
            },
            "num_experts": 36,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
        },
    ),
}


def build_body(config: MoEConfig) -> Body:
    """What `config.architecture` makes of the config, refined by `config.architecture_options`.

    Raises:
        ValueError: if the name or an option is unknown, or sizes and options do not fit together.
    """
    architecture = ARCHITECTURES[expect_name(config.architecture, ARCHITECTURES, "architecture")]
    options = config.architecture_options or {}
    for name in sorted(options):
        expect_name(name, architecture.options, f"option of the architecture {config.architecture!r},")
    return architecture(config, **options)


__all__ = ["ARCHITECTURES", "Architecture", "Body", "build_body"]
