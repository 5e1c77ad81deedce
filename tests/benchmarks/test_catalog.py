"""The catalogue's question, small: everything that is asked for is found, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import catalog, crowded
from benchmarks.processes import Stage
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Filters
from openmint.store.folder_store import FolderStore


@pytest.mark.integration
@pytest.mark.slow
def test_every_figure_is_there_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "SIZES", (100, 200, 10**9))
    monkeypatch.setattr(catalog, "NUM_RESOLVED", 20)
    for name in ("NUM_PAGES", "NUM_PROMOTED", "NUM_MARKED"):
        monkeypatch.setattr(catalog, name, 5)
    for name, value in (("NUM_STARTS", 1), ("NUM_REQUESTS", 8), ("LAP", 4)):
        monkeypatch.setattr(crowded, name, value)
    report = catalog.ask(Stage(largest=200), 2)
    assert [line.work for line in report.lines] == [
        f"{kind}: {what}"
        for kind in ("SQLite", "PostgreSQL")
        for what in (
            "resolve p50 at 200 / at 100",
            "resolve p99 at 200 / at 100",
            "warm request p95 beside 200 / beside 100",
        )
    ]
    assert {line.verdict for line in report.lines} <= {"met", "missed"}
    for houses in report.data.values():
        assert [house["size"] for house in houses] == [100, 200]
        for house in houses:
            figures = [house["imported"], *house["opened"], *house["reads"]]
            assert all(
                value > 0 for each in figures for name, value in each.items() if "mib" not in name
            )
            assert len(house["opened"]) == len(house["reads"]) == 2
            service = house["service"]
            assert len(service["ready_seconds"]) == 1
            assert len(service["p95_ms"]) == 2
            assert min(service["p95_ms"]) > 0 < service["gateway_mib"]


def test_no_two_adapters_are_equal() -> None:
    made = [catalog.adapter(index, size) for size in (100, 200) for index in range(100)]
    assert len({each.weights for each in made}) == 200


def test_every_adapter_is_imported_once_under_its_tenant() -> None:
    seen = [(tenant, index) for tenant, indices in catalog.batches(1000) for index in indices]
    assert sorted(index for _, index in seen) == list(range(1000))
    assert all(catalog.tenant_of(index) == tenant for tenant, index in seen)


def test_as_many_revisions_are_marked_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "NUM_MARKED", 9)
    for size in (100, 300):
        opened = Catalog.open(f"sqlite:///{tmp_path}/{size}.db")
        catalog.fill([opened], FolderStore(tmp_path), size)
        catalog.mark(opened, size)
        for nth in range(catalog.NUM_TENANTS):
            wanted = Filters(tag=catalog.TAG)
            found = opened.find_revisions(catalog.tenant_of(nth), wanted).items
            assert len({each.policy_name for each in found} - {catalog.BUSY}) == len(found) == 9
        opened.close()
