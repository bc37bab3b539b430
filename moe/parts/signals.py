"""What a caller tells routers besides the tokens: a condition, modalities, a bias per expert.

Shapes: B batch, S positions, T = B * S tokens, D model width, L MoE layers, R routable experts.
"""

from torch import Tensor


def signal_fields(
    B: int, S: int, D: int, condition_BD: Tensor | None, modality: Tensor | None, logit_bias_LR: Tensor | None
) -> dict[str, Tensor]:
    """Fields of a `RoutingContext` for one call.

    Args:
        B, S, D: sizes of the call.
        condition_BD: one condition per sequence.
        modality: int64 [B, S], or [B, 1] for one per sequence.
        logit_bias_LR: for all tokens of the call; the routers check that it fits.

    Returns:
        Only what was given, token by token.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    fields: dict[str, Tensor] = {}
    if condition_BD is not None:
        if condition_BD.shape != (B, D) or not condition_BD.is_floating_point():
            raise ValueError(
                f"condition must be floating point [{B}, {D}], one per sequence and as wide as the model; "
                f"got {condition_BD.dtype} {tuple(condition_BD.shape)}"
            )
        fields["condition_TD"] = condition_BD.repeat_interleave(S, dim=0)
    if modality is not None:
        if modality.shape not in ((B, S), (B, 1)) or modality.is_floating_point():
            raise ValueError(
                f"modality must be int64 [{B}, {S}], or [{B}, 1] for one per sequence; "
                f"got {modality.dtype} {tuple(modality.shape)}"
            )
        fields["modality_T"] = modality.expand(B, S).flatten()
    if logit_bias_LR is not None:
        fields["logit_bias_LR"] = logit_bias_LR
    return fields
