"""MoEConfig: everything that defines a model of ours; it is the `config.json` of its checkpoints."""

from math import isfinite
from typing import Any

from transformers import PreTrainedConfig

from routing import REUSE_LOSSES, RouterSizes, expect_router
from routing.ground.expect import expect_name

QK_NORMS = ("none", "head", "full")
ZERO_COMPUTE_KINDS = ("zero", "copy", "constant")


class MoEConfig(PreTrainedConfig):
    """A decoder language model whose feed-forward layers are mixtures of experts.

    Args:
        vocab_size: V; 256 for byte-level models.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: decoder layers, dense ones included.
        num_dense_layers: layers at the beginning that have a plain SwiGLU feed-forward of width `intermediate_size`.
        num_attention_heads, num_key_value_heads, head_dim: grouped-query attention; the number of heads is a multiple
            of the second.
        qkv_bias: whether queries, keys and values have biases, as in Qwen2; the output projection has none.
        qk_norm: RMSNorm of queries and keys: `none`, per `head`, or over the `full` width.
        num_experts: E, FFN experts per layer; zero-compute experts come on top.
        num_experts_per_tok: K, choices per token, zero-compute experts included.
        moe_intermediate_size: F, hidden width of one expert.
        num_shared_experts: shared experts of width F that every token visits, fused into one of width `F * n`.
        zero_compute_experts: kinds of the Z zero-compute experts: `zero`, `copy`, `constant`.
        router: a key of `routing.ROUTERS`; `router_options` refine it.
        architecture: a key of `moe.ARCHITECTURES`; `architecture_options` refine it.
        balance_loss_weight, z_loss_weight: coefficients of `routing.auxiliary_loss`, added to the loss in training.
        reuse_loss: a key of `routing.REUSE_LOSSES`, added in training with `reuse_loss_weight` as its coefficient.
        mtp_depth: tokens beyond the next that training predicts as well (multi-token prediction); 0 for none.
        mtp_loss_weight: coefficient of the mean of these losses.
        balance_loss_schedule: pairs (optimiser step, weight) in rising order; from that step on the weight replaces
            `balance_loss_weight`.

    Raises:
        ValueError: if a value is unknown or values do not fit together.
    """

    model_type = "expertier"
    # a list, because transformers adds one to it
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "router_stats", "losses", "passes"]  # noqa: RUF012

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 8
    num_dense_layers: int = 0
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    qkv_bias: bool = False
    qk_norm: str = "head"
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    num_shared_experts: int = 0
    zero_compute_experts: list[str] | tuple[str, ...] = ()
    router: str = "olmoe"
    router_options: dict[str, Any] | None = None
    architecture: str = "moe"
    architecture_options: dict[str, Any] | None = None
    balance_loss_weight: float = 0.01
    balance_loss_schedule: list[list[float]] | None = None
    z_loss_weight: float = 0.001
    reuse_loss: str = "none"
    reuse_loss_weight: float = 0.0
    mtp_depth: int = 0
    mtp_loss_weight: float = 0.1
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        expect_router(self.router)
        expect_name(self.reuse_loss, REUSE_LOSSES, "reuse loss")
        for name in ("balance_loss_weight", "z_loss_weight", "reuse_loss_weight", "mtp_loss_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value):
                raise ValueError(f"{name} must be a finite number; got {value!r}")
        if not isinstance(self.mtp_depth, int) or self.mtp_depth < 0:
            raise ValueError(f"mtp_depth must be a whole number of at least 0; got {self.mtp_depth!r}")
        steps = [pair[0] for pair in self.balance_loss_schedule or () if len(pair) == 2]
        if len(steps) != len(self.balance_loss_schedule or ()) or steps != sorted(steps):
            raise ValueError(
                f"balance_loss_schedule must be pairs (step, weight) in rising order; got {self.balance_loss_schedule}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(QK_NORMS)}; got {self.qk_norm!r}")
        if unknown := set(self.zero_compute_experts) - set(ZERO_COMPUTE_KINDS):
            raise ValueError(
                f"zero_compute_experts must be of {', '.join(ZERO_COMPUTE_KINDS)}; got {', '.join(sorted(unknown))}"
            )
        if not 0 <= self.num_dense_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_dense_layers must leave at least one of {self.num_hidden_layers} layers to experts; "
                f"got {self.num_dense_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def router_sizes(self) -> RouterSizes:
        """The sizes that routers are built from."""
        return RouterSizes(
            width=self.hidden_size,
            num_experts=self.num_experts,
            zero_compute=tuple(self.zero_compute_experts),
            top_k=self.num_experts_per_tok,
            num_layers=self.num_moe_layers,
            vocab_size=self.vocab_size,
            first_state_layer=self.num_hidden_layers,
        )
