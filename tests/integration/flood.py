"""`python -m tests.integration.flood URL KEY NUM`: keeps so many completions under way until it is
killed. Of many lengths: those of a real flood do not end in the same step. A process of its own, so
that it takes nothing from the client beside it."""

from __future__ import annotations

import asyncio
import random
import sys

import httpx

BODY = {"model": "tiny-llama", "prompt": [504, 3575, 282, 4649], "seed": 2}
SHORTEST, LONGEST = 150, 250


async def keep_asking(http: httpx.AsyncClient, lengths: random.Random) -> None:
    while True:
        body = BODY | {"max_tokens": lengths.randint(SHORTEST, LONGEST)}
        (await http.post("/v1/completions", json=body)).raise_for_status()


async def flood(url: str, key: str, num_requests: int) -> None:
    limits = httpx.Limits(max_connections=num_requests)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=120.0
    ) as http:
        await asyncio.gather(*(keep_asking(http, random.Random(i)) for i in range(num_requests)))


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1], sys.argv[2], int(sys.argv[3])))
