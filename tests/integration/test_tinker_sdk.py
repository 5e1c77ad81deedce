"""The unmodified Tinker SDK against a running server: the whole path of a training user."""

import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from tokenizers import Tokenizer

PROMPT = [504, 3575, 282, 4649, 314]


def sft_datum(tokens=(504, 3575, 282, 4649, 314, 7042)):
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={"target_tokens": list(tokens[1:]), "weights": [1.0] * (len(tokens) - 1)},
    )


def policy_datum(logprobs, advantages=1.0):
    tokens = list(sft_datum().loss_fn_inputs["target_tokens"].tolist())
    return types.Datum(
        model_input=sft_datum().model_input,
        loss_fn_inputs={
            "target_tokens": tokens,
            "logprobs": list(logprobs),
            "advantages": [advantages] * len(tokens),
        },
    )


@pytest.fixture
def client(server):
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        yield service


@pytest.fixture
def rest(server):
    return tinker.RestClient(base_url=server.url, api_key=server.admin_key)


@pytest.fixture
def base_model(rest):
    return rest.get_server_capabilities().result().supported_models[0].model_name


@pytest.fixture
def run(client, base_model):
    return client.create_lora_training_client(base_model=base_model, rank=8, seed=1).result()


def train(run, *data, loss="cross_entropy", steps=1, **config):
    losses = []
    for _ in range(steps):
        forward = run.forward_backward(list(data), loss, loss_fn_config=config or None)
        update = run.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(forward.result().metrics["loss:sum"])
        update.result()
    return losses


def test_get_info_names_base_and_rank(run, base_model):
    info = run.get_info()
    assert info.model_data.model_name == base_model
    assert info.lora_rank == 8


def test_sft_lowers_the_loss_and_returns_logprobs_in_shape(run):
    output = run.forward([sft_datum()], "cross_entropy").result()
    assert output.loss_fn_outputs[0]["logprobs"].to_numpy().shape == (5,)
    losses = train(run, sft_datum(), steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {}),
        ("dro", {"beta": 0.1}),
    ],
)
def test_policy_losses_run(run, loss, config):
    output = run.forward([sft_datum()], "cross_entropy").result()
    logprobs = output.loss_fn_outputs[0]["logprobs"].tolist()
    (value,) = train(run, policy_datum(logprobs), loss=loss, **config)
    assert np.isfinite(value)


def test_custom_loss_runs_in_two_passes(run):
    def loss(data, logprobs):
        total = -sum(values.sum() for values in logprobs)
        return total, {"mine:sum": float(total.detach())}

    output = run.forward_backward_custom([sft_datum()], loss).result()
    assert output.metrics["loss:sum"] > 0


def test_soft_targets_with_sparse_weights_run(run):
    torch = pytest.importorskip("torch")
    targets = torch.zeros(5, 40, dtype=torch.int64)
    weights = torch.zeros(5, 40)
    targets[:, :2] = torch.tensor([11, 12])
    weights[:, :2] = 0.5
    datum = types.Datum(
        model_input=sft_datum().model_input,
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    output = run.forward_backward([datum], "cross_entropy").result()
    assert output.loss_fn_outputs[0]["logprobs"].to_numpy().shape == (5, 40)


def test_many_chunks_and_pipelined_steps_keep_their_order(run):
    futures = []
    for _ in range(5):
        futures.append(run.forward_backward([sft_datum()] * 3, "cross_entropy"))
        futures.append(run.optim_step(types.AdamParams(learning_rate=1e-3)))
    results = [future.result() for future in futures]
    losses = [result.metrics["loss:sum"] for result in results[::2]]
    assert losses == sorted(losses, reverse=True)
    assert len(results[0].loss_fn_outputs) == 3


def test_sampler_sees_the_trained_weights(run, client, base_model):
    before = client.create_sampling_client(base_model=base_model).result()
    train(run, sft_datum(), steps=5)
    after = run.save_weights_and_get_sampling_client().result()
    tokens = types.ModelInput.from_ints([504, 3575, 282, 4649, 314, 7042])
    gained = sum(after.compute_logprobs(tokens).result()[1:])
    assert gained > sum(before.compute_logprobs(tokens).result()[1:]) + 1


def test_trainer_and_sampler_agree(run):
    train(run, sft_datum(), steps=2)
    trained = run.forward([sft_datum()], "cross_entropy").result()
    sampler = run.save_weights_and_get_sampling_client().result()
    tokens = types.ModelInput.from_ints([504, 3575, 282, 4649, 314, 7042])
    sampled = np.array(sampler.compute_logprobs(tokens).result()[1:])
    differences = np.abs(trained.loss_fn_outputs[0]["logprobs"].to_numpy() - sampled)
    assert differences.max() < 0.1


def test_sampling_options(client, base_model):
    sampler = client.create_sampling_client(base_model=base_model).result()
    prompt = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=4, seed=3, temperature=1.0, stop=[])
    one = sampler.sample(prompt, 3, params).result()
    two = sampler.sample(prompt, 3, params).result()
    assert [s.tokens for s in one.sequences] == [s.tokens for s in two.sequences]
    assert all(len(s.tokens) == len(s.logprobs) == 4 for s in one.sequences)
    assert all(s.stop_reason == "length" for s in one.sequences)


def test_a_stop_token_ends_the_sample_and_is_in_it(client, base_model):
    sampler = client.create_sampling_client(base_model=base_model).result()
    prompt = types.ModelInput.from_ints(PROMPT)
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    tokens = sampler.sample(prompt, 1, greedy).result().sequences[0].tokens
    stopped = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[tokens[2]])
    sequence = sampler.sample(prompt, 1, stopped).result().sequences[0]
    assert sequence.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert sequence.stop_reason == "stop"


def test_a_session_that_ends_gives_its_samples_up(server, base_model):
    http = httpx.Client(base_url=server.url, headers={"X-API-Key": server.admin_key})
    service = tinker.ServiceClient(base_url=server.url, api_key=server.admin_key)
    sampler = service.create_sampling_client(base_model=base_model).result()
    endless = types.SamplingParams(max_tokens=8000, temperature=1.0, stop=[])
    pending = sampler.sample(types.ModelInput.from_ints(PROMPT), 2, endless)

    def num_running():
        (base,) = http.get("/catalog/v1/stats").json()["bases"]
        return base["num_running_sequences"]

    wait_until(lambda: num_running() == 2)
    service.close("interrupted")
    wait_until(lambda: num_running() == 0)
    # Either the service's answer comes first, or the SDK notices that it was closed.
    with pytest.raises((tinker.RequestFailedError, RuntimeError), match=r"ended|closed"):
        pending.result()


def wait_until(holds):
    deadline = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_end_token_stops_beside_a_stop_string_but_not_beside_stop_ids(
    client, base_model, embedded_base
):
    sampler = client.create_sampling_client(base_model=base_model).result()
    tokenizer = Tokenizer.from_file(str(embedded_base / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    text = question + "<|im_start|>assistant\nThe capital of France is Paris."
    prompt = types.ModelInput.from_ints(tokenizer.encode(text).ids)

    def tokens(stop):
        params = types.SamplingParams(max_tokens=24, temperature=0.0, stop=stop)
        return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)

    assert end in tokens([])[:-1]
    for stop in (None, "never said", ["never said"]):
        assert tokens(stop)[-1] == end
        assert tokens(stop).count(end) == 1
    assert len(tokens([49151])) == 24


def test_prompt_alternatives_are_draws_with_the_models_logprobs(client, base_model):
    sampler = client.create_sampling_client(base_model=base_model).result()
    greedy = types.SamplingParams(max_tokens=1, temperature=0.0)
    prompt = types.ModelInput.from_ints(PROMPT)
    best = sampler.sample(prompt, 1, greedy, topk_prompt_logprobs=1, prompt_alt_tokens_k=2).result()
    drawn = best.prompt_alt_tokens
    assert drawn.tokens.shape == drawn.logprobs.shape == [len(PROMPT) - 1, 2]
    expected = [row[0] for row in best.topk_prompt_logprobs[1:]]
    rows = zip(drawn.tokens.to_numpy(), drawn.logprobs.to_numpy(), expected, strict=True)
    for tokens, logprobs, (token, logprob) in rows:
        assert list(tokens) == [token, token]
        assert list(logprobs) == pytest.approx([logprob, logprob])


def test_prompt_logprobs_of_every_kind(client, base_model):
    sampler = client.create_sampling_client(base_model=base_model).result()
    params = types.SamplingParams(max_tokens=1, temperature=0.0)
    response = sampler.sample(
        types.ModelInput.from_ints(PROMPT),
        1,
        params,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
    ).result()
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    assert len(response.topk_prompt_logprobs[1]) == 3
    assert response.sequences[0].topk_logprobs_np.token_ids.shape == (1, 2)


def test_state_continues_as_if_never_stopped(run, client):
    train(run, sft_datum(), steps=2)
    path = run.save_state("half").result().path
    copy = client.create_training_client_from_state_with_optimizer(path).result()
    assert train(copy, sft_datum(), steps=2) == pytest.approx(
        train(run, sft_datum(), steps=2), rel=1e-3
    )


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # the SDK has a newer way; this one still works
def test_load_state_goes_back(run):
    path = run.save_state("start").result().path
    first = train(run, sft_datum(), steps=2)
    run.load_state(path).result()
    assert train(run, sft_datum(), steps=1)[0] == pytest.approx(first[0], rel=1e-3)


def test_a_policy_keeps_its_name_and_named_saves_are_listed(client, rest, base_model):
    run = client.create_lora_training_client(
        base_model=base_model, rank=4, user_metadata={"policy": "support"}
    ).result()
    path = run.save_weights_for_sampler("first").result().path
    listed = rest.list_checkpoints(run.model_id).result().checkpoints
    assert [checkpoint.tinker_path for checkpoint in listed] == [path]
    assert rest.get_training_run(run.model_id).result().user_metadata == {"policy": "support"}
    sampler = client.create_sampling_client(model_path=path).result()
    assert sampler.sample(
        types.ModelInput.from_ints(PROMPT), 1, types.SamplingParams(max_tokens=1)
    ).result()


def test_rest_client_reads_and_manages(run, rest):
    state = run.save_state("one", ttl_seconds=3600).result().path
    external = run.save_weights_external("peft").result().path
    assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 8
    assert run.model_id in {
        r.training_run_id for r in rest.list_training_runs().result().training_runs
    }
    assert rest.list_user_checkpoints().result().cursor.total_count >= 2
    rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
    rest.publish_checkpoint_from_tinker_path(state).result()
    checkpoints = {
        c.tinker_path: c for c in rest.list_checkpoints(run.model_id).result().checkpoints
    }
    assert checkpoints[state].public
    assert checkpoints[state].expires_at is None
    assert set(checkpoints) == {state, external}
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert len(rest.list_checkpoints(run.model_id).result().checkpoints) == 1
    session = run.model_id.partition(":")[0]
    assert run.model_id in rest.get_session(session).result().training_run_ids
    assert session in rest.list_sessions().result().sessions


def test_a_published_checkpoint_can_be_used_by_another_tenant_and_no_other(server, rest, run):
    path = run.save_state("shared").result().path
    key = server.make_key("globex")
    with tinker.ServiceClient(base_url=server.url, api_key=key) as other:
        with pytest.raises(tinker.NotFoundError):
            other.create_training_client_from_state(path).result()
        rest.publish_checkpoint_from_tinker_path(path).result()
        copy = other.create_training_client_from_state(path).result()
        assert copy.get_info().lora_rank == 8


def test_weights_can_be_copied_into_a_session_of_their_own(rest, run):
    path = run.save_weights_for_sampler("original").result().path
    copied = rest.copy_weights(path, "elsewhere", ttl_seconds=3600).result()
    assert copied != path
    assert rest.get_weights_info_by_tinker_path(copied).result().lora_rank == 8


def test_a_bad_request_leaves_the_run_as_it_was(run):
    before = run.forward([sft_datum()], "cross_entropy").result().metrics
    with pytest.raises(tinker.BadRequestError, match="vocabulary"):
        run.forward_backward([sft_datum((1, 2, 10**6, 4))], "cross_entropy").result()
    assert run.forward([sft_datum()], "cross_entropy").result().metrics == before


def test_hundreds_of_samples_at_once(client, base_model):
    sampler = client.create_sampling_client(base_model=base_model).result()
    params = types.SamplingParams(max_tokens=2, temperature=1.0)
    futures = [sampler.sample(types.ModelInput.from_ints([504, i]), 1, params) for i in range(64)]
    assert all(len(future.result().sequences) == 1 for future in futures)
