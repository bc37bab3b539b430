"""ClassicRule: how logits become a routing, as plain values that fit into a config.json.

Shapes: T tokens, K experts per token, R = E + Z routable experts.
"""

import math
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Literal, get_args

from ...contract.router import RouterSizes
from ...losses.balance import BALANCE_LOSSES
from ...losses.capacity import CAPACITY_POLICIES

Score = Literal["softmax", "selected_softmax", "sigmoid"]
NormaliseOver = Literal["selected", "ffn", "nonzero"]
GroupScore = Literal["max", "top2"]
CapacityRule = Literal["share", "tutel"]
Init = Literal["normal", "truncated", "kaiming"]


@dataclass(frozen=True, kw_only=True)
class ClassicRule:
    """How logits become a routing, and how the router is kept balanced.

    Args:
        score: `softmax` over all routable experts, `selected_softmax` over the K selected logits, or `sigmoid`.
        renormalise: divide the selected weights by their sum; `selected_softmax` does so by nature.
        normalise_over: which selected experts that sum runs over: all `selected`, `ffn` experts only, or all that are
            not `zero` experts; the others then weigh nothing.
        scale: multiplies the weights.
        num_groups: experts form this many equal groups; 1 means no groups.
        groups_kept: a token may only use experts of its best groups.
        group_score: a group is as good as its `max` score, or the sum of its `top2`.
        bias_rate: step of the loss-free balancing bias, which takes part in selection only; 0 turns it off.
        target_load: FFN experts per token that the bias steers towards, in proportion to each expert's error and with
            zero-compute experts left alone; None steers every routable expert to the mean load by its error's sign.
        capacity_factor: an expert takes at most `ceil(factor * T * K / R)` tokens in training; None drops nothing.
        capacity_rule: `share` as above, or `tutel`: see `routing.capacity.tutel_capacity` (the factor may be negative).
        capacity_policy: `first`, `priority`, `weight` or `random`: who stays when an expert overflows.
        renormalise_kept: divide by the sum of the weights that are left after overflow was dropped.
        ffn_share: load that one FFN expert should take relative to one zero-compute expert, in capacities and in the
            balance loss.
        jitter: in training, inputs are multiplied by uniform noise in `1 - jitter .. 1 + jitter`.
        balance_loss: the loss, of `routing.losses.BALANCE_LOSSES`, that the router is trained with.
        init: weights start `normal`, normal and `truncated` at `init_cut` standard deviations, or `kaiming`: uniform
            within `1 / sqrt(D)` (a = sqrt 5, as in `nn.Linear`).
        init_scale: variance times D of the first two before truncation; None takes the model's initialiser range.
        init_cut: where `truncated` ends.
        null_copy_noise: rows of zero-compute experts start as copies of the FFN experts' rows plus noise of this
            relative size, see `routing.nulls.copy_ffn_rows_to_nulls`; None starts them like all rows.

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    score: Score = "softmax"
    renormalise: bool = False
    normalise_over: NormaliseOver = "selected"
    scale: float = 1.0
    num_groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "max"
    bias_rate: float = 0.0
    target_load: float | None = None
    capacity_factor: float | None = None
    capacity_rule: CapacityRule = "share"
    capacity_policy: str = "first"
    renormalise_kept: bool = False
    ffn_share: float = 1.0
    jitter: float = 0.0
    balance_loss: str = "switch"
    init: Init = "normal"
    init_scale: float | None = None
    init_cut: float = 2.0
    null_copy_noise: float | None = None

    def __post_init__(self) -> None:
        self._expect_types()
        expect_one_of("score", self.score, get_args(Score))
        expect_one_of("normalise_over", self.normalise_over, get_args(NormaliseOver))
        expect_one_of("group_score", self.group_score, get_args(GroupScore))
        expect_one_of("capacity_rule", self.capacity_rule, get_args(CapacityRule))
        expect_one_of("init", self.init, get_args(Init))
        expect_one_of("capacity_policy", self.capacity_policy, tuple(CAPACITY_POLICIES))
        expect_one_of("balance_loss", self.balance_loss, tuple(BALANCE_LOSSES))
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, which means no groups; got {self.num_groups}")
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ValueError(f"groups_kept must lie in 1..{self.num_groups} (num_groups); got {self.groups_kept}")
        for name in ("capacity_factor", "target_load", "ffn_share", "init_scale", "init_cut"):
            value = getattr(self, name)
            is_free = name == "capacity_factor" and self.capacity_rule == "tutel"
            if value is not None and value <= 0 and not is_free:
                raise ValueError(f"{name} must be positive; got {value}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in 0..1; got {self.jitter}")
        if self.bias_rate < 0:
            raise ValueError(f"bias_rate must not be negative; got {self.bias_rate}")
        if self.init == "kaiming" and self.init_scale is not None:
            raise ValueError("init='kaiming' has a scale of its own; leave init_scale out")
        if self.null_copy_noise is not None and self.null_copy_noise < 0:
            raise ValueError(f"null_copy_noise must not be negative; got {self.null_copy_noise}")
        if self.target_load is not None and not self.bias_rate:
            raise ValueError(
                "target_load is reached by the balancing bias; give a bias_rate above 0, for instance 1e-3"
            )
        if self.normalise_over != "selected" and self.score != "selected_softmax" and not self.renormalise:
            raise ValueError(
                f"normalise_over={self.normalise_over!r} needs weights that are normalised; "
                "set renormalise, or score to selected_softmax"
            )

    def _expect_types(self) -> None:
        """Options come from JSON files: numbers must be numbers, and finite."""
        for field in fields(self):
            expect_plain(field.name, getattr(self, field.name), field.type)

    def reachable(self, sizes: RouterSizes) -> int:
        """Experts among which a token can choose: those of the groups that it keeps."""
        return sizes.num_routable // self.num_groups * self.groups_kept

    def check_sizes(self, sizes: RouterSizes) -> None:
        """Raises ValueError if these sizes cannot be routed by this rule."""
        if sizes.num_routable % self.num_groups:
            raise ValueError(f"{sizes.num_routable} experts do not divide into {self.num_groups} groups")
        reachable = self.reachable(sizes)
        if reachable < sizes.top_k:
            raise ValueError(f"{self.groups_kept} groups hold {reachable} experts, fewer than top_k = {sizes.top_k}")
        if self.null_copy_noise is not None and sizes.num_zero_compute % sizes.num_experts:
            raise ValueError(
                f"null_copy_noise needs zero-compute experts in multiples of {sizes.num_experts} (E); "
                f"got {sizes.num_zero_compute}"
            )
        if self.target_load is not None:
            if not sizes.num_zero_compute:
                raise ValueError(
                    "target_load needs zero-compute experts that can take the rest of the load; there are none"
                )
            if self.target_load >= min(sizes.top_k, sizes.num_experts):
                raise ValueError(f"target_load must be below top_k = {sizes.top_k}; got {self.target_load}")


def expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if a setting is not among its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def expect_plain(name: str, value: object, annotation: object) -> None:
    """Raises ValueError if an option does not have the plain type of its parameter: a number, a name, yes or no."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return
    if float in kinds:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    for kind in (int, bool, str):
        if kind in kinds:
            expect_type(name, value, kind)


def expect_type(name: str, value: object, kind: type) -> None:
    """Raises ValueError if a setting is not of the plain type that it should have; a bool is no int."""
    if type(value) is not kind:
        raise ValueError(f"{name} must be {kind.__name__}; got {value!r}")
