"""The few calls of the catalogue's REST API that the demo needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Score:
    """A finished evaluation. `revision` is None for the base."""

    revision: str | None
    percent: float
    num_items: int
    low_percent: float
    high_percent: float

    def __str__(self) -> str:
        return f"{self.percent:.1f} % [{self.low_percent:.0f}-{self.high_percent:.0f}]"


class Catalogue:
    """One tenant's view of the catalogue."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=f"{url}/catalog/v1", headers=headers, timeout=60)

    def evaluate(self, model: str, task: dict[str, object]) -> Score:
        """Score `model` greedily on a task; the service keeps the result with the revision."""
        found = self._send("POST", "/evaluations", {"model": model, "task": task, "seed": 0})
        while found["status"] == "running":
            time.sleep(POLL_SECONDS)
            found = self._send("GET", f"/evaluations/{found['evaluation_id']}")
        if found["status"] != "finished":
            raise RuntimeError(f"evaluation of {model}: {found['error']}")
        low, high = found["interval_95"]
        return Score(found["revision"], 100 * found["score"], found["n"], 100 * low, 100 * high)

    def revision(self, policy: str, reference: str) -> dict[str, Any]:
        """A revision by alias or digest."""
        return self._send("GET", f"/policies/{policy}/revisions/{reference}")

    def promote(self, policy: str, digest: str, reason: str) -> str:
        """Point `prod` at a revision; its digest."""
        body = {"revision": digest, "reason": reason}
        moved = self._send("POST", f"/policies/{policy}/aliases/prod/promote", body)
        return str(moved["digest"])

    def roll_back(self, policy: str, reason: str) -> str:
        """Point `prod` back at what it named before; the digest of that."""
        moved = self._send("POST", f"/policies/{policy}/aliases/prod/rollback", {"reason": reason})
        return str(moved["digest"])

    def base_weight_bytes(self) -> int:
        return int(self._send("GET", "/stats")["bases"][0]["weight_bytes"])

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self._client.request(method, path, json=body)
        if not response.is_success:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        return answer
