import asyncio
import time

import numpy as np
import pytest

from openmint.errors import BodyMismatch, Gone, NotFound
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import Futures
from openmint.types import Datum, LossSpec, Tenant

ACME, GLOBEX = Tenant("acme"), Tenant("globex")


def test_retry_finds_the_same_future_and_another_body_is_refused():
    futures = Futures(60)
    future = futures.open(ACME, "optim_step", ("seq", "run", 1), b"a")
    assert futures.existing(("seq", "run", 1), b"a") is future
    with pytest.raises(BodyMismatch, match="new seq_id"):
        futures.existing(("seq", "run", 1), b"b")


def test_another_tenants_future_is_not_found():
    futures = Futures(60)
    future = futures.open(ACME, "optim_step", ("k",), b"")
    assert futures.get(ACME, future.request_id) is future
    with pytest.raises(NotFound):
        futures.get(GLOBEX, future.request_id)


def test_a_sample_that_nobody_remembers_is_gone_whosever_it_was():
    futures = Futures(60)
    sample = futures.open(ACME, "sample", ("k",), b"")
    assert futures.get(ACME, sample.request_id) is sample
    for tenant, request_id in ((GLOBEX, sample.request_id), (ACME, sample.request_id + "0")):
        with pytest.raises(Gone, match="sample again"):
            futures.get(tenant, request_id)


def test_finished_futures_are_forgotten_after_their_time_and_pending_ones_never():
    futures = Futures(60)
    done = futures.open(ACME, "optim_step", ("a",), b"")
    pending = futures.open(ACME, "optim_step", ("b",), b"")
    done.resolve({})
    assert futures.sweep(time.monotonic()) == []
    assert futures.sweep(time.monotonic() + 61) == [done]
    assert futures.get(ACME, pending.request_id) is pending


def test_wait_says_whether_the_future_finished():
    async def scenario():
        futures = Futures(60)
        future = futures.open(ACME, "optim_step", ("a",), b"")
        assert not await futures.wait(future, 0.01)
        asyncio.get_running_loop().call_soon(future.resolve, {"x": 1})
        assert await futures.wait(future, 5)

    asyncio.run(scenario())


def test_fingerprint_sees_content_and_not_representation():
    def datum(weight):
        return Datum(np.array([1, 2]), {"weights": np.array([0.0, weight], np.float32)})

    loss = LossSpec("ppo", {"b": 1.0, "a": 2.0})
    same = LossSpec("ppo", {"a": 2.0, "b": 1.0})
    assert fingerprint((datum(1),), loss) == fingerprint((datum(1),), same)
    assert fingerprint((datum(1),), loss) != fingerprint((datum(2),), loss)
    assert fingerprint("a", "b") != fingerprint("ab")
