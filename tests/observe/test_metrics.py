"""Metrics: names that dashboards know, values from the workers, few labels."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from openmint.observe.metrics import Metrics
from openmint.scheduler.work import WorkerStats


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_worker_stats_appear_under_the_names_of_vllm_dashboards() -> None:
    metrics = Metrics()
    stats = WorkerStats(
        num_running_sequences=3, kv_pages_total=8, kv_pages_used=2, prompt_tokens=7, optim_steps=5
    )
    metrics.watch_workers(lambda: [("org/base", True, stats)])
    found, label = samples(metrics), (("model_name", "org/base"),)
    assert found["vllm:num_requests_running", label] == 3
    assert found["vllm:kv_cache_usage_perc", label] == 0.25
    assert found["vllm:prompt_tokens_total", label] == 7
    assert found["openmint_optim_steps_total", label] == 5
    assert found["openmint_worker_up", label] == 1


def test_a_dead_worker_shows_as_down() -> None:
    metrics = Metrics()
    metrics.watch_workers(lambda: [("org/base", False, WorkerStats())])
    assert samples(metrics)["openmint_worker_up", (("model_name", "org/base"),)] == 0


def test_requests_count_by_route_template_and_class() -> None:
    metrics = Metrics()
    for status in (200, 201, 404):
        metrics.observe_request("/v1/models/{id}", status, 0.02)
    found = samples(metrics)
    route = ("route", "/v1/models/{id}")
    assert found["openmint_http_requests_total", (route, ("status", "2xx"))] == 2
    assert found["openmint_http_requests_total", (route, ("status", "4xx"))] == 1
    assert found["openmint_http_request_seconds_count", (route,)] == 3
