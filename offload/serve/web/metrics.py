"""Counts for Prometheus, with the suffixes of vLLM's names, and those of experts, which only an offloaded model has.

Shapes: L MoE layers.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...engine.counters import EngineCounters, Spread
from ..answers import Ended

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
"""Borders of histograms: tokens of a model in memory take milliseconds, a cold prefill from a disk minutes."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
"""The same for tokens of a request, by factors of four."""
TIMES = {
    "time_to_first_token_seconds": "from the request to its first token",
    "inter_token_latency_seconds": "between two tokens of an answer",
    "e2e_request_latency_seconds": "from the request to the end of its answer",
    "request_queue_time_seconds": "in the queue",
    "request_prefill_time_seconds": "reading the prompt",
    "request_decode_time_seconds": "from the first token to the last",
}
COUNTS = {
    "prompt_tokens": "tokens of prompts",
    "generation_tokens": "tokens generated",
    "prefix_cache_queries": "tokens of prompts that were looked up among kept prefixes",
    "prefix_cache_hits": "tokens of prompts whose keys and values were kept",
}


class Metrics:
    """Counts of one server.

    Args:
        model_name: label of all counts.
    """

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second number for each count, which no dashboard reads
        self.registry = CollectorRegistry()
        self.model_name = model_name
        label: dict[str, Any] = {"labelnames": ("model_name",), "registry": self.registry}
        self._seconds = {
            name: Histogram(f"expertier:{name}", f"Seconds {what}.", buckets=SECONDS, **label).labels(model_name)
            for name, what in TIMES.items()
        }
        self._tokens = {
            name: Histogram(f"expertier:request_{name}", f"Tokens of a {what}.", buckets=TOKENS, **label).labels(
                model_name
            )
            for name, what in (("prompt_tokens", "prompt"), ("generation_tokens", "answer"))
        }
        self._counts = {
            name: Counter(f"expertier:{name}", f"All {what}.", **label).labels(model_name)
            for name, what in COUNTS.items()
        }
        more: dict[str, Any] = {"registry": self.registry}
        self._success = Counter(
            "expertier:request_success", "Answers, by how they ended.", ("model_name", "finished_reason"), **more
        )
        self._refused = Counter(
            "expertier:requests_refused", "Requests that were refused, by reason.", ("model_name", "reason"), **more
        )

    def refused(self, reason: str) -> None:
        """A request was refused."""
        self._refused.labels(self.model_name, reason).inc()

    def gap(self, seconds: float) -> None:
        """Time between two tokens of an answer."""
        self._seconds["inter_token_latency_seconds"].observe(seconds)

    def ended(self, ended: Ended) -> None:
        """An answer is complete."""
        usage = ended.usage
        self._success.labels(self.model_name, ended.reason).inc()
        for name, number in (
            ("prompt_tokens", usage.prompt_tokens),
            ("generation_tokens", usage.completion_tokens),
            ("prefix_cache_queries", usage.prompt_tokens),
            ("prefix_cache_hits", usage.cached_tokens),
        ):
            self._counts[name].inc(number)
        if not usage.completion_tokens:
            return
        self._tokens["prompt_tokens"].observe(usage.prompt_tokens)
        self._tokens["generation_tokens"].observe(usage.completion_tokens)
        first_s = usage.queue_s + usage.prefill_s
        for name, seconds in (
            ("time_to_first_token_seconds", first_s),
            ("e2e_request_latency_seconds", first_s + usage.decode_s),
            ("request_queue_time_seconds", usage.queue_s),
            ("request_prefill_time_seconds", usage.prefill_s),
            ("request_decode_time_seconds", usage.decode_s),
        ):
            self._seconds[name].observe(seconds)

    def watch(self, counters: Callable[[], EngineCounters], budget: Mapping[str, int]) -> None:
        """Read the engine's and the experts' counts too, at each scrape.

        Args:
            counters: gives the engine's counts.
            budget: bytes of memory by part.
        """
        self.registry.register(EngineCollector(self.model_name, counters, budget))

    def text(self) -> bytes:
        """All counts in Prometheus' form."""
        return bytes(generate_latest(self.registry))


class EngineCollector(Collector):
    """What the engine and the offloading count themselves.

    Args:
        model_name: label of all counts.
        counters: gives the engine's counts.
        budget: bytes of memory by part.
    """

    def __init__(self, model_name: str, counters: Callable[[], EngineCounters], budget: Mapping[str, int]) -> None:
        self._model_name, self._counters, self._budget = model_name, counters, budget

    def collect(self) -> Iterable[Metric]:
        """All of them, of one moment."""
        now = self._counters()
        used = now.kv_in_use / now.kv_capacity if now.kv_capacity else 0.0
        yield self._gauge("num_requests_running", "Requests whose answers are generated.", now.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", now.queued)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV pool that running requests use, 0 to 1.", used)
        yield self._gauge("kv_reserved_tokens", "Tokens of the KV pool that are promised.", now.kv_reserved)
        yield self._gauge("kv_kept_tokens", "Tokens of the KV pool that hold kept prefixes.", now.kv_kept)
        yield self._counter("steps", "Calls of the model.", now.steps_total)
        yield self._histogram("iteration_tokens_total", "Tokens in a step.", now.step_tokens)
        yield self._histogram(
            "experts_per_step", "Experts that a layer asked for in a step, the mean of all layers.", now.step_experts
        )
        yield self._counter("batch_rows", "Tokens in steps that decode.", now.rows_total)
        yield self._counter("prefill_seconds", "Seconds of steps that read prompts.", now.prefill_s)
        yield self._counter("decode_seconds", "Seconds of other steps.", now.decode_s)
        yield self._counter("disk_busy_seconds", "Seconds in which the disk had something to read.", now.disk_busy_s)
        yield self._counter("lookup_proposed_tokens", "Tokens that prompt lookup proposed.", now.proposed_total)
        yield self._counter("lookup_accepted_tokens", "Tokens of them that were right.", now.accepted_total)
        yield self._counter(
            "overtaken_requests", "Waiting requests that a later one started before.", now.overtaken_total
        )
        yield self._layers("expert_hits", "Experts that were in memory when a layer asked.", now.hits_L)
        yield self._layers("expert_misses", "Experts that were not.", now.misses_L)
        yield self._layers("expert_bytes_read", "Bytes of experts read from files.", now.bytes_read_L)
        budget = GaugeMetricFamily("expertier:budget_bytes", "Memory by part.", labels=("model_name", "part"))
        for part, size in self._budget.items():
            budget.add_metric((self._model_name, part), size)
        yield budget

    def describe(self) -> Iterable[Metric]:
        """Nothing: asking for the counts before there is an engine would fail."""
        return ()

    def _gauge(self, name: str, what: str, number: float) -> Metric:
        gauge = GaugeMetricFamily(f"expertier:{name}", what, labels=("model_name",))
        gauge.add_metric((self._model_name,), number)
        return gauge

    def _counter(self, name: str, what: str, number: float) -> Metric:
        counter = CounterMetricFamily(f"expertier:{name}", what, labels=("model_name",))
        counter.add_metric((self._model_name,), number)
        return counter

    def _histogram(self, name: str, what: str, spread: Spread) -> Metric:
        histogram = HistogramMetricFamily(f"expertier:{name}", what, labels=("model_name",))
        borders = [*map(float, spread.borders), "+Inf"]
        counts = accumulate(spread.counts)
        buckets = [(str(border), count) for border, count in zip(borders, counts, strict=True)]
        histogram.add_metric((self._model_name,), buckets, spread.total)
        return histogram

    def _layers(self, name: str, what: str, number_L: Sequence[int]) -> Metric:
        layers = CounterMetricFamily(f"expertier:{name}", what, labels=("model_name", "layer"))
        for layer, number in enumerate(number_L):
            layers.add_metric((self._model_name, str(layer)), number)
        return layers


class Stopwatch:
    """Measures gaps between the tokens of one answer.

    Args:
        metrics: where they are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._last_s = metrics, 0.0

    def tick(self) -> None:
        """A token came."""
        now = time.perf_counter()
        if self._last_s:
            self._metrics.gap(now - self._last_s)
        self._last_s = now
