"""Which member answers a prompt: by its label, by words of a rule, or by what it learned from examples. Without torch.

The learned router is a naive Bayes classifier over words: its counts are exact sums, so that no seed and no rate decide
who answers. Sources: Composition of Experts (arXiv:2405.07518) routes prompts to models by a classifier; Decentralized
Diffusion Models (arXiv:2501.05450) does so by a router over data clusters.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

from routing.ground.expect import expect_name

WORD = re.compile(r"\w+|[^\w\s]")
SMOOTHING = 0.5
"""Added to each count, so that a word which one member has not seen does not decide alone (Jeffreys' prior)."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one member is found.

    Args:
        labels: other names by which requests may ask for it.
        words: words in a prompt that speak for it.
        prompts: examples of prompts that it should answer.
    """

    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Who answers, and why: `label`, `words`, `learned` or `default`; `share_M` are the learned probabilities."""

    name: str
    why: str
    share_M: Mapping[str, float]


def words_of(text: str) -> list[str]:
    """Words and signs of a text, in lower case."""
    return WORD.findall(text.lower())


class Chooser:
    """Chooses a member for each prompt.

    Args:
        rules: of each member, by name; at least one.
        default: who answers if nothing speaks for anybody; None is the first.
    """

    def __init__(self, rules: Mapping[str, Rules], default: str | None = None) -> None:
        self._rules = dict(rules)
        self._default = default or next(iter(rules))
        self._labels = {label: name for name, rule in rules.items() for label in (*rule.labels, name)}
        learning = {name: rule.prompts for name, rule in rules.items() if rule.prompts}
        self._bayes = NaiveBayes(learning) if len(learning) > 1 else None

    @property
    def default(self) -> str:
        """Who answers if nothing speaks for anybody."""
        return self._default

    @property
    def labels(self) -> list[str]:
        """Names that requests may ask for."""
        return sorted(self._labels)

    def choose(self, prompt: str, label: str | None = None) -> Chosen:
        """Who answers a prompt.

        Args:
            prompt: its text.
            label: whom the request asks for; None lets the prompt decide.

        Raises:
            ValueError: if nobody has that label.
        """
        if label is not None:
            expect_name(label, self._labels, "member or label")
            return Chosen(name=self._labels[label], why="label", share_M={})
        words = set(words_of(prompt))
        hits = {name: len(words.intersection(map(str.lower, rule.words))) for name, rule in self._rules.items()}
        most = max(hits.values())
        best = [name for name, count in hits.items() if count == most]
        if most and len(best) == 1:
            return Chosen(name=best[0], why="words", share_M={})
        if self._bayes is not None and (share_M := self._bayes.shares(prompt)):
            return Chosen(name=max(share_M, key=lambda name: share_M[name]), why="learned", share_M=share_M)
        return Chosen(name=self._default, why="default", share_M={})


class NaiveBayes:
    """Probabilities of members given a prompt's words, each member alike before the first word.

    Args:
        prompts: examples of each member, at least two members.
    """

    def __init__(self, prompts: Mapping[str, Sequence[str]]) -> None:
        self._counts = {name: Counter(words_of("\n".join(texts))) for name, texts in prompts.items()}
        self._known = set[str]().union(*self._counts.values())

    def shares(self, prompt: str) -> dict[str, float]:
        """Probabilities by name; empty if no word of the prompt stands in any example."""
        words = [word for word in words_of(prompt) if word in self._known]
        if not words:
            return {}
        scores = {name: sum(self._log_share(name, word) for word in words) for name in self._counts}
        most = max(scores.values())
        total = sum(exp(score - most) for score in scores.values())
        return {name: exp(score - most) / total for name, score in scores.items()}

    def _log_share(self, name: str, word: str) -> float:
        counts = self._counts[name]
        return log((counts[word] + SMOOTHING) / (counts.total() + SMOOTHING * len(self._known)))
