"""ClassicRule: how logits become a routing, in parts; every field of a part is an option of a config.json.

Shapes: T tokens, K experts per token, E FFN experts, R = E + Z routable experts.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ...contract.router import RouterSizes
from ...losses.balance import BALANCE_LOSSES
from ...losses.capacity import CAPACITY_POLICIES
from ..options import Options, expect_one_of, read_options

Score = Literal["softmax", "selected_softmax", "sigmoid", "sqrt_softplus"]
NormaliseOver = Literal["selected", "ffn", "nonzero"]
GroupScore = Literal["max", "top2"]
CapacityRule = Literal["share", "tutel"]
Init = Literal["normal", "truncated", "kaiming"]


@dataclass(frozen=True, kw_only=True)
class Scoring(Options):
    """How inputs become scores, and the scores of the selected experts weights.

    Args:
        score: `softmax` over all routable experts, `selected_softmax` over the K selected logits, `sigmoid`, or
            `sqrt_softplus`: the square root of `log(1 + e^z)` (DeepSeek-V4).
        renormalise: divide the selected weights by their sum; `selected_softmax` does so by nature.
        normalise_over: which selected experts that sum runs over: all `selected`, `ffn` experts only, or all that are
            not `zero` experts; the others then weigh nothing.
        scale: factor of the weights, after they were normalised.
        jitter: in training, inputs are multiplied by uniform noise in `1 - jitter .. 1 + jitter`; 0 <= jitter < 1.

    Raises:
        ValueError: if a value is out of range, or a normalising sum is chosen for weights that are not normalised.
    """

    score: Score = "softmax"
    renormalise: bool = False
    normalise_over: NormaliseOver = "selected"
    scale: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in 0..1; got {self.jitter}")
        if self.normalise_over != "selected" and not self.is_normalised:
            raise ValueError(
                f"normalise_over={self.normalise_over!r} needs weights that are normalised; "
                "set renormalise, or score to selected_softmax"
            )

    @property
    def is_normalised(self) -> bool:
        """Whether the weights of a token sum to `scale`."""
        return self.renormalise or self.score == "selected_softmax"


@dataclass(frozen=True, kw_only=True)
class Grouping(Options):
    """Which experts a token may choose from.

    Args:
        num_groups: experts form this many equal groups; 1 means no groups.
        groups_kept: a token may only use experts of its best groups, 1..num_groups.
        group_score: a group is as good as its `max` score, or the sum of its `top2`.

    Raises:
        ValueError: if a number is out of range.
    """

    num_groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, which means no groups; got {self.num_groups}")
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ValueError(f"groups_kept must lie in 1..{self.num_groups} (num_groups); got {self.groups_kept}")

    def reachable(self, sizes: RouterSizes) -> int:
        """Experts among which a token can choose: those of the groups that it keeps."""
        return sizes.num_routable // self.num_groups * self.groups_kept

    def check_sizes(self, sizes: RouterSizes) -> None:
        """Raises ValueError if groups do not divide these experts or leave fewer than K of them."""
        if sizes.num_routable % self.num_groups:
            raise ValueError(f"{sizes.num_routable} experts do not divide into {self.num_groups} groups")
        reachable = self.reachable(sizes)
        if reachable < sizes.top_k:
            raise ValueError(f"{self.groups_kept} groups hold {reachable} experts, fewer than top_k = {sizes.top_k}")


@dataclass(frozen=True, kw_only=True)
class Balance(Options):
    """How training keeps experts evenly loaded.

    Args:
        balance_loss: the loss, of `routing.BALANCE_LOSSES`, that the router is trained with.
        bias_rate: step of the loss-free balancing bias, which takes part in selection only; 0 turns it off.
        target_load: FFN experts per token that the bias steers towards, in proportion to each expert's error and with
            zero-compute experts left alone; None steers every routable expert to the mean load by its error's sign.
        ffn_share: load that one FFN expert should take relative to one zero-compute expert, in capacities and in the
            balance loss.

    Raises:
        ValueError: if a value is unknown or out of range, or there is a target without a bias.
    """

    balance_loss: str = "switch"
    bias_rate: float = 0.0
    target_load: float | None = None
    ffn_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("balance_loss", self.balance_loss, tuple(BALANCE_LOSSES))
        _expect_positive(target_load=self.target_load, ffn_share=self.ffn_share)
        if self.bias_rate < 0:
            raise ValueError(f"bias_rate must not be negative; got {self.bias_rate}")
        if self.target_load is not None and not self.bias_rate:
            raise ValueError(
                "target_load is reached by the balancing bias; give a bias_rate above 0, for instance 1e-3"
            )

    def check_sizes(self, sizes: RouterSizes) -> None:
        """Raises ValueError if the load target cannot be reached with these sizes."""
        if self.target_load is None:
            return
        if not sizes.num_zero_compute:
            raise ValueError(
                "target_load needs zero-compute experts that can take the rest of the load; there are none"
            )
        if self.target_load >= min(sizes.top_k, sizes.num_experts):
            raise ValueError(f"target_load must be below top_k = {sizes.top_k}; got {self.target_load}")


@dataclass(frozen=True, kw_only=True)
class Capacity(Options):
    """How many tokens an expert takes in training, and which of them when more chose it.

    Args:
        capacity_factor: an expert takes at most `ceil(factor * T * K / R)` tokens in training; None drops nothing.
        capacity_rule: `share` as above, or `tutel`: see `routing.losses.capacity.tutel_capacity`, whose factor may be 0
            or negative.
        capacity_policy: `first`, `priority`, `weight` or `random`: who stays when an expert overflows.
        renormalise_kept: divide by the sum of the weights that are left after overflow was dropped.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    capacity_factor: float | None = None
    capacity_rule: CapacityRule = "share"
    capacity_policy: str = "first"
    renormalise_kept: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("capacity_policy", self.capacity_policy, tuple(CAPACITY_POLICIES))
        if self.capacity_rule != "tutel":
            _expect_positive(capacity_factor=self.capacity_factor)


@dataclass(frozen=True, kw_only=True)
class Initial(Options):
    """How the router's weights start.

    Args:
        init: `normal`, normal and `truncated` at `init_cut` standard deviations, or `kaiming`: uniform within
            `1 / sqrt(D)` (a = sqrt 5, as in `nn.Linear`).
        init_scale: variance times D of the first two before truncation; None takes the model's initialiser range.
        init_cut: where `truncated` ends, in standard deviations.
        null_copy_noise: rows of zero-compute experts start as copies of the FFN experts' rows plus noise of this
            relative size, see `routing.copy_ffn_rows_to_nulls`; None starts them like all rows.

    Raises:
        ValueError: if a value is out of range, or `kaiming` is given a scale.
    """

    init: Init = "normal"
    init_scale: float | None = None
    init_cut: float = 2.0
    null_copy_noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_positive(init_scale=self.init_scale, init_cut=self.init_cut)
        if self.init == "kaiming" and self.init_scale is not None:
            raise ValueError("init='kaiming' has a scale of its own; leave init_scale out")
        if self.null_copy_noise is not None and self.null_copy_noise < 0:
            raise ValueError(f"null_copy_noise must not be negative; got {self.null_copy_noise}")

    def check_sizes(self, sizes: RouterSizes) -> None:
        """Raises ValueError if null rows cannot be copies of the FFN experts' rows."""
        if self.null_copy_noise is not None and sizes.num_zero_compute % sizes.num_experts:
            raise ValueError(
                f"null_copy_noise needs zero-compute experts in multiples of {sizes.num_experts} (E); "
                f"got {sizes.num_zero_compute}"
            )


@dataclass(frozen=True, kw_only=True)
class ClassicRule:
    """How logits become a routing, and how the router is kept balanced."""

    scoring: Scoring = field(default_factory=Scoring)
    grouping: Grouping = field(default_factory=Grouping)
    balance: Balance = field(default_factory=Balance)
    capacity: Capacity = field(default_factory=Capacity)
    initial: Initial = field(default_factory=Initial)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The rule of some options by name, whatever part they belong to, as a config.json has them.

        Raises:
            ValueError: if an option is unknown or does not fit.
        """
        return cls.of_parts(*read_options(RULE_PARTS, options))

    @classmethod
    def of_parts(
        cls, scoring: Scoring, grouping: Grouping, balance: Balance, capacity: Capacity, initial: Initial
    ) -> Self:
        """The rule of its parts in the order of `RULE_PARTS`."""
        return cls(scoring=scoring, grouping=grouping, balance=balance, capacity=capacity, initial=initial)

    def check_sizes(self, sizes: RouterSizes) -> None:
        """Raises ValueError if these sizes cannot be routed by this rule."""
        for part in (self.grouping, self.initial, self.balance):
            part.check_sizes(sizes)


RULE_PARTS = (Scoring, Grouping, Balance, Capacity, Initial)


def _expect_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive; got {value}")
