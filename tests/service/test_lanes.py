import asyncio

from openmint.service.lanes import Lane


class Sender:
    """Submits jobs to a lane and remembers the order in which they started and ended."""

    def __init__(self, gap_seconds=5.0):
        self.lane = Lane("run", 1, gap_seconds)
        self.started, self.ended = [], []
        self.release, self.changed = asyncio.Event(), asyncio.Event()

    def submit(self, seq, *, blocks=False, barrier=False):
        async def job():
            self.started.append(seq)
            if blocks:
                await self.release.wait()
            self.ended.append(seq)
            self.changed.set()

        self.lane.submit(seq, job, barrier=barrier)

    async def until_ended(self, *seqs):
        while not set(seqs) <= set(self.ended):
            self.changed.clear()
            await self.changed.wait()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_requests_start_in_seq_order_without_waiting_for_results():
    async def scenario():
        sender = Sender()
        sender.submit(1, blocks=True)
        sender.submit(3)
        sender.submit(2)
        await sender.until_ended(2, 3)
        assert sender.started == [1, 2, 3]
        assert sender.ended == [2, 3]
        assert sender.lane.next_seq == 4
        sender.release.set()
        await sender.until_ended(1)

    run(scenario())


def test_a_refused_seq_id_leaves_no_gap():
    async def scenario():
        sender = Sender(gap_seconds=60)
        sender.lane.refuse(1)
        sender.submit(2)
        await sender.until_ended(2)

    run(scenario())


def test_a_seq_id_that_never_comes_delays_the_next_for_the_window_only():
    async def scenario():
        sender = Sender(gap_seconds=0.05)
        sender.submit(2)
        await sender.until_ended(2)
        assert sender.lane.next_seq == 3

    run(scenario())


def test_a_barrier_waits_for_all_before_and_holds_all_after():
    async def scenario():
        sender = Sender()
        sender.submit(1, blocks=True)
        sender.submit(2, barrier=True)
        sender.submit(3)
        await asyncio.sleep(0.02)
        assert sender.started == [1]
        assert sender.lane.sent_seq == 1
        sender.release.set()
        await sender.until_ended(2, 3)
        assert sender.started == [1, 2, 3]

    run(scenario())


def test_a_stopped_lane_sends_nothing_more_and_what_runs_can_be_waited_for():
    async def scenario():
        sender = Sender()
        sender.submit(1, blocks=True)
        await asyncio.sleep(0.01)
        sender.lane.stop()
        sender.submit(2)
        waiting = asyncio.create_task(sender.lane.wait_running())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        sender.release.set()
        await waiting
        assert sender.ended == [1]

    run(scenario())


def test_nothing_counts_as_sent_before_its_job_took_its_first_step():
    async def scenario():
        sender, seen = Sender(), []

        async def job():
            seen.append(sender.lane.sent_seq)

        async def look():
            while len(seen) < 3:
                assert sender.lane.sent_seq <= len(seen)
                await asyncio.sleep(0)

        for seq in (1, 2, 3):
            sender.lane.submit(seq, job)
        await look()
        assert seen == [0, 1, 2]

    run(scenario())


def test_nor_does_it_in_a_lane_that_goes_over_what_was_sent_to_another_worker():
    async def scenario():
        lane, seen = Lane("run", 1, 5.0).successor(100), []

        def job_of(seq):
            async def job():
                assert lane.sent_seq < seq
                seen.append(seq)

            return job

        for seq in (3, 7, 8):
            lane.submit(seq, job_of(seq))
        while len(seen) < 3:
            sent = [seq for seq in (3, 7, 8) if seq <= lane.sent_seq]
            assert sent == seen[: len(sent)]
            await asyncio.sleep(0)
        await lane.wait_running()
        assert lane.sent_seq == 99

    run(scenario())


def test_a_successor_goes_on_from_where_it_is_told_and_knows_what_was_refused():
    async def scenario():
        sender = Sender(gap_seconds=60)
        sender.lane.refuse(3)
        sender.lane.stop()
        sender.lane = sender.lane.successor(2)
        for seq in (4, 1, 2):
            sender.submit(seq)
        assert (sender.lane.next_seq, sender.lane.sent_seq) == (2, 0)
        await sender.until_ended(1, 2, 4)
        assert sender.started == [1, 2, 4]
        assert sender.lane.sent_seq == 4

    run(scenario())
