"""What counts as a failed probe, and that real revisions pass theirs."""

import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from openmint.service.probes import Probe, probe_tokens
from tests.catalog.made import BASE

WAIT_SECONDS = 30.0


@pytest.mark.parametrize(
    ("probe", "failure"),
    [
        (Probe(0.0, 0.5, is_zero=False), None),
        (Probe(0.05, 0.5, is_zero=False), None),
        (Probe(0.0, 0.0, is_zero=True), None),
        (Probe(0.2, 0.5, is_zero=False), "drift"),
        (Probe(float("nan"), 0.5, is_zero=False), "drift"),
        (Probe(0.0, 0.0, is_zero=False), "equals_base"),
        (Probe(0.0, 0.5, is_zero=True), "changes_base"),
    ],
)
def test_a_slot_must_agree_with_its_bytes_and_differ_from_its_base(probe, failure):
    assert probe.failure(0.1) == failure


def test_every_probe_of_a_base_asks_the_same_tokens():
    np.testing.assert_array_equal(probe_tokens(BASE), probe_tokens(BASE))
    assert probe_tokens(BASE).max() < BASE.vocab_size


@pytest.mark.integration
def test_published_revisions_are_probed_and_keep_what_was_found(server):
    """A fresh adapter equals its base; a trained one differs, and as its bytes train."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        named = {"policy": "probed"}
        run = service.create_lora_training_client(
            server.base, rank=4, seed=1, user_metadata=named
        ).result()
        run.save_weights_for_sampler("fresh").result()
        tokens = [504, 3575, 282, 4649, 314, 7042]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 5},
        )
        for _ in range(2):
            run.forward_backward([datum], "cross_entropy").result()
            run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        run.save_weights_for_sampler("trained").result()
    trained, fresh = probed(server)
    assert (fresh["drift"], fresh["base_difference"]) == (0.0, 0.0)
    assert trained["drift"] < 0.05
    assert trained["base_difference"] > 0.1
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'openmint_probes_total{base="' + server.base + '",outcome="ok"}' in metrics


def probed(server):
    """The policy's revisions, newest first, once both have their probe."""
    url = f"{server.url}/catalog/v1/policies/default/probed/revisions"
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = httpx.get(url, headers=headers).json()["items"]
        if all(revision["drift"] is not None for revision in found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
