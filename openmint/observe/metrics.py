"""Prometheus metrics of the gateway and, through their stats, of the workers.

Names that vLLM's dashboards know keep those names where the meaning is the same; the rest begin
with `openmint_`. Labels are few and bounded (base, route, outcome): never a policy, a tenant's
free text or a key. Numbers per policy live in the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openmint.scheduler.work import WorkerStats

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

StatsSource = Callable[[], Iterable[tuple[str, bool, WorkerStats]]]
"""Gives (base name, alive, latest stats) of every worker at the moment of a scrape."""

WORKER_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("vllm:num_requests_running", "num_running_sequences", "Sequences that decode now."),
    (
        "vllm:num_requests_waiting",
        "num_waiting_sequences",
        "Sequences that wait for pages or room.",
    ),
    ("openmint_training_waiting", "num_waiting_train", "Training commands that wait."),
    ("openmint_training_runs", "num_training_runs", "Training runs in the worker's memory."),
    ("openmint_resident_revisions", "num_resident_revisions", "Revisions in host memory."),
    ("openmint_pinned_bytes", "pinned_bytes", "Bytes of host memory that pins hold."),
    ("openmint_slots", "num_slots", "Revisions in serving slots."),
    ("openmint_waiting_loads", "num_waiting_loads", "Revisions that wait to be loaded."),
    ("openmint_kv_pages", "kv_pages_total", "Pages of the KV cache."),
    ("openmint_kv_pages_used", "kv_pages_used", "Pages of the KV cache in use."),
    ("openmint_journal_bytes", "journal_bytes", "Logged gradients since the runs' snapshots."),
    ("openmint_journal_sound", "journal_is_sound", "1 while updates can be acknowledged."),
)
WORKER_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("vllm:prompt_tokens", "prompt_tokens", "Prompt tokens prefilled or found in the cache."),
    ("vllm:generation_tokens", "generated_tokens", "Tokens sampled."),
    ("vllm:prefix_cache_hits", "cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
    ("vllm:num_preemptions", "preemptions", "Sequences put back for lack of pages."),
    ("openmint_trained_tokens", "trained_tokens", "Tokens that went forward and backward."),
    ("openmint_optim_steps", "optim_steps", "Optimizer steps done."),
    ("openmint_revision_loads", "revision_loads", "Revisions loaded from the store."),
    ("openmint_revision_prefetches", "revision_prefetches", "Loads that nobody had asked for yet."),
    ("openmint_revision_evictions", "revision_evictions", "Revisions that left host memory."),
    ("openmint_slot_evictions", "slot_evictions", "Revisions that left their slot."),
    (
        "openmint_coldload_deadline_missed",
        "deadlines_missed",
        "Samples refused because their revision was not in memory in time.",
    ),
    ("openmint_train_seconds", "train_seconds", "Seconds the engine spent training."),
    ("openmint_serve_seconds", "serve_seconds", "Seconds the engine spent sampling."),
)


class Metrics:
    """What the gateway counts; one per process, joined in `cli/gateway.py`."""

    def __init__(self, version: str = "0") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "openmint_http_requests",
            "HTTP requests by route template and status class.",
            ("route", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "openmint_http_request_seconds",
            "Time to the end of the answer.",
            ("route",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time from the request to the first token of a stream.",
            ("model_name",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.sample_seconds = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Time from the request to its last token.",
            ("model_name",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.command_seconds = Histogram(
            "openmint_command_seconds",
            "Time of a training command from acceptance to result.",
            ("command", "outcome"),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.futures_pending = Gauge(
            "openmint_futures_pending", "Results not there yet.", registry=registry
        )
        self.worker_restarts = Counter(
            "openmint_worker_restarts",
            "Workers restarted after a death.",
            ("base",),
            registry=registry,
        )
        self.probes = Counter(
            "openmint_probes",
            "Probes of published revisions: ok, drift, equals_base, changes_base.",
            ("base", "outcome"),
            registry=registry,
        )
        self.watch_actions = Counter(
            "openmint_watch_actions",
            "Failed watches: canary_abort, rollback, or nothing to go back to.",
            ("action",),
            registry=registry,
        )
        build = Gauge("openmint_build_info", "Always 1.", ("version",), registry=registry)
        build.labels(version).set(1)

    def watch_workers(self, source: StatsSource) -> None:
        """Include the workers' stats in each scrape."""
        self.registry.register(WorkerCollector(source))

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP answer; `route` is its template (`/v1/models/{id}`), not the path."""
        self.requests.labels(route, f"{status // 100}xx").inc()
        self.request_seconds.labels(route).observe(seconds)

    def observe_command(self, base: str, kind: str, seconds: float, ok: bool) -> None:
        """Time one command of a worker; samples under vLLM's name, the rest by kind and outcome."""
        if kind != "SampleWork":
            self.command_seconds.labels(kind, "ok" if ok else "error").observe(seconds)
        elif ok:
            self.sample_seconds.labels(base).observe(seconds)

    def observe_probe(self, base: str, outcome: str) -> None:
        """Count one probe of a revision."""
        self.probes.labels(base, outcome).inc()

    def observe_watch(self, action: str) -> None:
        """Count what a failed watch did."""
        self.watch_actions.labels(action).inc()

    def observe_first_token(self, base: str, seconds: float) -> None:
        """Time to the first token of a streamed sample."""
        self.first_token_seconds.labels(base).observe(seconds)

    def watch_futures(self, num_pending: Callable[[], int]) -> None:
        """Count pending results at each scrape."""
        self.futures_pending.set_function(num_pending)

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class WorkerCollector(Collector):
    """Turns the workers' latest stats into metrics at scrape time; keeps no numbers itself."""

    def __init__(self, source: StatsSource) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        workers = list(self._source())
        yield self._gauge(
            "openmint_worker_up",
            "1 while the worker answers.",
            [(name, float(alive)) for name, alive, _ in workers],
        )
        for metric, field, text in WORKER_GAUGES:
            yield self._gauge(metric, text, [(n, getattr(s, field)) for n, _, s in workers])
        usage = [(n, s.kv_pages_used / max(1, s.kv_pages_total)) for n, _, s in workers]
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", usage)
        tiers = GaugeMetricFamily(
            "openmint_tier_bytes", "Bytes in each tier of memory.", labels=("model_name", "tier")
        )
        for name, _, stats in workers:
            tiers.add_metric([name, "training"], stats.training_bytes)
            tiers.add_metric([name, "host"], stats.host_bytes)
            tiers.add_metric([name, "serving"], stats.serving_bytes)
        yield tiers
        for metric, field, text in WORKER_COUNTERS:
            counter = CounterMetricFamily(metric, text, labels=("model_name",))
            for name, _, stats in workers:
                counter.add_metric([name], getattr(stats, field))
            yield counter

    @staticmethod
    def _gauge(name: str, text: str, values: list[tuple[str, float]]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=("model_name",))
        for model_name, value in values:
            gauge.add_metric([model_name], value)
        return gauge
