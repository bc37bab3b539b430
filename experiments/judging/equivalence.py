"""Statistics of differences that are paired by seed: equivalence within a margin, and effect sizes with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
"""Of intervals of a mean: the usual level; with two numbers one is 12.7 standard errors wide on each side."""
LEVEL = 0.05
"""Of each one-sided test, and of what intervals leave out: the usual level."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Two one-sided tests of a mean difference.

    Args:
        margin: differences smaller than this count as none; it was stated before the runs.
        p_value: of the worse of both tests, 0..1.
        low, high: the 90 % interval; it lies within the margin exactly where both tests reject.
    """

    margin: float
    p_value: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        return self.p_value < LEVEL


@dataclass(frozen=True, kw_only=True)
class EffectSize:
    """A mean difference in standard deviations of the differences, corrected for few pairs, with its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(gaps: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t; None with fewer than two numbers.

    Args:
        gaps: differences, one per pair, or values, one per run.
    """
    if len(gaps) < 2:
        return None
    from scipy.stats import t

    mean = fmean(gaps)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return mean - reach, mean + reach


def equivalence(gaps: Sequence[float], margin: float) -> Equivalence | None:
    """Whether a mean difference lies within a margin; None with fewer than two pairs.

    Args:
        gaps: differences, one per pair.
        margin: above 0.

    Raises:
        ValueError: if the margin is not a positive number.

    Source: Schuirmann 1987, doi:10.1007/BF01068419: two one-sided t-tests.
    """
    expect_margin(margin)
    if len(gaps) < 2:
        return None
    from scipy.stats import t

    n, mean = len(gaps), fmean(gaps)
    error = stdev(gaps) / math.sqrt(n)
    if error == 0:
        p_value = 0.0 if abs(mean) < margin else 1.0
        return Equivalence(margin=margin, p_value=p_value, low=mean, high=mean)
    above, below = (float(t.sf(distance / error, n - 1)) for distance in (mean + margin, margin - mean))
    reach = float(t.ppf(1 - LEVEL, n - 1)) * error
    return Equivalence(margin=margin, p_value=max(above, below), low=mean - reach, high=mean + reach)


def effect_size(gaps: Sequence[float]) -> EffectSize | None:
    """Hedges' g of paired differences; None with fewer than two pairs, or where all are equal.

    The interval inverts the noncentral t distribution.

    Source: Hedges 1981, doi:10.3102/10769986006002107; Lakens 2013, doi:10.3389/fpsyg.2013.00863, eqs. 4 and 6.
    """
    n = len(gaps)
    if n < 2 or stdev(gaps) == 0:
        return None
    statistic = fmean(gaps) / stdev(gaps) * math.sqrt(n)
    correction = 1 - 3 / (4 * (n - 1) - 1)
    low, high = (_noncentrality(statistic, n - 1, share) for share in (1 - LEVEL / 2, LEVEL / 2))
    value, low, high = (correction * one / math.sqrt(n) for one in (statistic, low, high))
    return EffectSize(value=value, low=low, high=high)


def _noncentrality(statistic: float, freedom: int, share: float) -> float:
    """The noncentrality under which a t statistic lies at this share of its distribution."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    def above(shift: float) -> float:
        under = float(nct.cdf(statistic, freedom, shift))
        # far from the statistic SciPy gives NaN instead of all or nothing
        return (float(shift < statistic) if math.isnan(under) else under) - share

    # ten times the statistic and more hold every quantile that is asked for
    reach = 10 * (abs(statistic) + 10)
    return float(brentq(above, -reach, reach))


def expect_margin(margin: float) -> None:
    """Raises ValueError if a margin is not a positive number."""
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"the margin must be a positive number of bits per byte; got {margin}")


def share_interval(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    from scipy.stats import binomtest

    found = binomtest(hits, trials).proportion_ci(1 - LEVEL, method="wilson")
    return float(found.low), float(found.high)
