import asyncio

from openmint.errors import Gone, InvalidRequest
from openmint.service.futures import Futures
from openmint.service.lanes import Lane
from openmint.types import Tenant

ACME = Tenant("acme")


class Sender:
    """Submits requests to a lane and remembers the order in which they started."""

    def __init__(self, gap_seconds=5.0):
        self.lane = Lane("run", 1, gap_seconds)
        self.futures = Futures(60)
        self.started = []
        self.release = asyncio.Event()

    def submit(self, seq, *, blocks=False, barrier=False, error=None):
        async def start():
            self.started.append(seq)
            if blocks:
                await self.release.wait()
            if error:
                raise error
            return seq

        future = self.futures.open(ACME, "optim_step", ("run", seq), b"")
        self.lane.submit(seq, future, start, barrier=barrier)
        return future


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_requests_start_in_seq_order_without_waiting_for_results():
    async def scenario():
        sender = Sender()
        first = sender.submit(1, blocks=True)
        third, second = sender.submit(3), sender.submit(2)
        await asyncio.gather(second.done.wait(), third.done.wait())
        assert sender.started == [1, 2, 3]
        assert not first.done.is_set()
        sender.release.set()
        await first.done.wait()

    run(scenario())


def test_a_refused_seq_id_leaves_no_gap():
    async def scenario():
        sender = Sender(gap_seconds=60)
        sender.lane.refuse(1)
        await sender.submit(2).done.wait()

    run(scenario())


def test_a_seq_id_that_never_comes_delays_the_next_for_the_window_only():
    async def scenario():
        sender = Sender(gap_seconds=0.05)
        await sender.submit(2).done.wait()
        late = sender.submit(1)
        await late.done.wait()
        assert sender.started == [2, 1]

    run(scenario())


def test_a_barrier_waits_for_all_before_and_holds_all_after():
    async def scenario():
        sender = Sender()
        sender.submit(1, blocks=True)
        barrier = sender.submit(2, barrier=True)
        after = sender.submit(3)
        await asyncio.sleep(0.02)
        assert sender.started == [1]
        sender.release.set()
        await asyncio.gather(barrier.done.wait(), after.done.wait())
        assert sender.started == [1, 2, 3]

    run(scenario())


def test_a_failed_request_does_not_stop_the_lane():
    async def scenario():
        sender = Sender()
        bad = sender.submit(1, error=InvalidRequest("no"))
        broken = sender.submit(2, error=ValueError("bug"))
        good = sender.submit(3)
        await good.done.wait()
        assert bad.error.code == "invalid_request"
        assert broken.error.code == "engine_failed"
        assert good.result == 3

    run(scenario())


def test_closing_fails_what_was_not_sent():
    async def scenario():
        sender = Sender()
        sender.submit(1, blocks=True)
        held = sender.submit(2, barrier=True)
        await asyncio.sleep(0.01)
        await sender.lane.close()
        assert isinstance(held.error, Gone)

    run(scenario())


def test_what_comes_after_the_end_is_refused_and_not_kept():
    async def scenario():
        sender = Sender()
        await sender.lane.close()
        late = sender.submit(1)
        assert isinstance(late.error, Gone)
        assert sender.started == []

    run(scenario())
