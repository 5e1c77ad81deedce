"""What a new worker is sent, from what was written down."""

from dataclasses import replace

import numpy as np
import pytest

from openmint.catalog.records import RequestRecord, SavedState
from openmint.errors import StoreFailed
from openmint.scheduler.work import CreateRun, OptimWork, RestoreRun, TrainWork
from openmint.service.orders import CODEC, LoadOrder, SaveOrder, StartOrder
from openmint.service.rebuilding import next_seq_of, past_of
from openmint.types import (
    AdamParams,
    Datum,
    Digest,
    LoraSpec,
    LossSpec,
    RunId,
    SessionId,
    Tenant,
)

RUN, T, SPEC = RunId("s:train:0"), Tenant("t"), LoraSpec(4)
BASE = Digest("sha256:" + "0" * 64)
CREATE = CreateRun(RUN, T, SPEC, 7)
RESTORE = RestoreRun(RUN, T, Digest("sha256:" + "1" * 64), "training", optimizer=True)
START = StartOrder("create_model", SessionId("s"), 0, BASE, SPEC, {}, CREATE)
UPDATE = OptimWork(RUN, T, AdamParams())
SAVE = SaveOrder("weights", "a", None, overwrite=False, user_metadata=None)


def work(seed, *, forward_only=False):
    data = (Datum(np.arange(seed + 2), {"target_tokens": np.arange(seed + 2)}),)
    return TrainWork(RUN, T, data, LossSpec("cross_entropy"), forward_only)


def rows(*orders):
    """Requests 0, 1, 2, ... of these orders; an order in a tuple comes with its status."""
    made = []
    for seq, order in enumerate(orders):
        order, status = order if isinstance(order, tuple) else (order, "done")
        body = None if order is None else CODEC.encode(order)
        made.append(
            RequestRecord(
                RUN, seq, SessionId("s"), T, f"r{seq}", "kind", b"", status, body, None, None
            )
        )
    return made


def past(requests, *, logged=(), snapshot=None):
    """(seq, kind of command) of what is sent."""
    return [
        (seq, type(command).__name__)
        for seq, command in past_of(RUN, T, requests, snapshot, logged)
    ]


def test_passes_that_a_logged_update_used_up_are_left_out():
    requests = rows(START, work(1), UPDATE, work(2), work(3), UPDATE, work(4))
    assert past(requests, logged={2, 5}) == [
        (0, "CreateRun"),
        (2, "OptimWork"),
        (5, "OptimWork"),
        (6, "TrainWork"),
    ]


def test_updates_that_are_not_logged_are_computed_again():
    requests = rows(START, work(1), UPDATE, work(2), work(3), UPDATE, work(4))
    kinds = [(0, "CreateRun"), (1, "TrainWork"), (2, "OptimWork")]
    kinds += [(3, "TrainWork"), (4, "TrainWork"), (5, "OptimWork"), (6, "TrainWork")]
    assert past(requests) == kinds
    assert past(requests, logged={5}) == [*kinds[:3], *kinds[5:]]


def test_an_acknowledged_update_says_so_and_under_which_request_it_was_logged():
    (_, _), (seq, command) = past_of(RUN, T, rows(START, UPDATE), None, {1})
    assert (seq, command.seq, command.is_acknowledged) == (1, 1, True)


def test_what_has_no_outcome_is_sent_by_its_own_job():
    requests = rows(START, work(1), (work(2), "accepted"), (UPDATE, "accepted"), work(3))
    assert past(requests, logged={3}) == [(0, "CreateRun"), (4, "TrainWork")]
    assert past(requests) == [(0, "CreateRun"), (1, "TrainWork"), (4, "TrainWork")]


def test_a_refused_update_leaves_its_gradient_to_the_next():
    requests = rows(START, work(1), (UPDATE, "failed"), work(2), (work(3), "failed"), UPDATE)
    assert past(requests, logged={5}) == [(0, "CreateRun"), (5, "OptimWork")]
    assert past(requests) == [
        (0, "CreateRun"),
        (1, "TrainWork"),
        (3, "TrainWork"),
        (5, "OptimWork"),
    ]


def test_what_changes_no_state_is_not_done_again():
    requests = rows(START, work(1, forward_only=True), SAVE, None, work(2))
    requests[1] = rows(None, None)[1]  # a finished forward keeps no body
    assert past(requests) == [(0, "CreateRun"), (4, "TrainWork")]


def test_a_load_throws_the_gradient_away():
    requests = rows(START, work(1), LoadOrder("tinker://x", RESTORE), work(2))
    assert past(requests) == [(0, "CreateRun"), (2, "RestoreRun"), (3, "TrainWork")]


def test_a_snapshot_stands_for_everything_up_to_it():
    requests = rows(START, work(1), UPDATE, work(2), UPDATE, work(3))
    saved = SavedState(RESTORE.digest, 3)
    sent = past_of(RUN, T, requests, saved, {2, 4})
    assert sent[0] == (3, RESTORE)
    assert [seq for seq, _ in sent] == [3, 4, 5]


def test_the_next_request_follows_what_was_sent_and_what_joins_it():
    assert next_seq_of(rows(START), None) == 1
    assert next_seq_of(rows((START, "accepted")), None) == 1
    assert next_seq_of(rows(START, work(1), (work(2), "accepted"), (UPDATE, "accepted")), None) == 4
    waiting = rows(START, work(1), (work(2), "accepted"), (UPDATE, "accepted"))
    del waiting[2]
    assert next_seq_of(waiting, None) == 2, "request 2 may still come before 3"
    assert next_seq_of(rows(START), SavedState(RESTORE.digest, 9)) == 10


def test_an_unreadable_request_is_an_error_of_the_store():
    requests = rows(START, work(1))
    requests[1] = replace(requests[1], body=b"cut")
    with pytest.raises(StoreFailed, match="unreadable"):
        past_of(RUN, T, requests, None, ())
