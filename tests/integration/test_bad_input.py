"""Bad input over HTTP: a clear 4xx that names the limit, and a run that still works afterwards."""

import json
import time

import httpx
import pytest

TOKENS = [504, 3575, 282, 4649]


class Client:
    """Raw Tinker HTTP calls of one tenant, on one session and run."""

    def __init__(self, server, key):
        self.http = httpx.Client(
            base_url=f"{server.url}/api/v1", headers={"X-API-Key": key}, timeout=60
        )
        self.base = self.get("/get_server_capabilities").json()["supported_models"][0]
        self.session = self.post("/create_session", {"tags": []}).json()["session_id"]
        self.run = f"{self.session}:train:0"
        created = self.post("/create_model", self.model_body())
        assert self.result(created)["model_id"] == self.run
        bound = {"session_id": self.session, "sampling_session_seq_id": 0}
        bound["base_model"] = self.base["model_name"]
        self.sampler = self.post("/create_sampling_session", bound).json()["sampling_session_id"]
        self.next_seq, self.next_sample = 1, 0

    def get(self, path):
        return self.http.get(path)

    def post(self, path, body):
        if isinstance(body, dict):
            # httpx refuses NaN, which is what some of these tests send.
            body = json.dumps(body).encode()
        return self.http.post(path, content=body, headers={"Content-Type": "application/json"})

    def model_body(self, seq=0, **changes):
        given = {"session_id": self.session, "model_seq_id": seq, "lora_config": {"rank": 4}}
        return {**given, "base_model": self.base["model_name"], **changes}

    def train_body(self, tokens=TOKENS, loss="cross_entropy", config=None, **inputs):
        arrays = {"target_tokens": tokens, **inputs}
        tensors = {
            name: {
                "data": values,
                "dtype": "int64" if name == "target_tokens" else "float32",
                "shape": [len(values)],
            }
            for name, values in arrays.items()
            if values is not None
        }
        chunks = [{"type": "encoded_text", "tokens": tokens}]
        datum = {"model_input": {"chunks": chunks}, "loss_fn_inputs": tensors}
        given = {"data": [datum], "loss_fn": loss, "loss_fn_config": config or {}}
        return self.of_run(forward_backward_input=given)

    def of_run(self, **fields):
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        return {"model_id": self.run, "seq_id": seq, **fields}

    def sample_body(self, tokens=TOKENS, params=None, **changes):
        seq, self.next_sample = self.next_sample, self.next_sample + 1
        prompt = {"chunks": [{"type": "encoded_text", "tokens": tokens}]}
        given = {"sampling_session_id": self.sampler, "seq_id": seq, "prompt": prompt}
        return {**given, "sampling_params": {"max_tokens": 1, **(params or {})}, **changes}

    def result(self, submitted):
        assert submitted.status_code == 200, submitted.text
        request = {"request_id": submitted.json()["request_id"]}
        while (answer := self.post("/retrieve_future", request)).status_code == 408:
            pass
        return answer.json()

    def assert_run_works(self):
        trained = self.result(self.post("/forward_backward", self.train_body()))
        assert trained["metrics"]["loss:sum"] > 0, trained
        updated = self.result(self.post("/optim_step", self.of_run(adam_params={})))
        assert "error" not in updated


@pytest.fixture(scope="module")
def client(server):
    return Client(server, server.admin_key)


@pytest.fixture(scope="module")
def other(server):
    return Client(server, server.make_key("globex"))


def assert_refused(answer, status, *says):
    assert answer.status_code == status, answer.text
    assert int(answer.headers["content-length"]) > 0
    assert answer.headers["x-request-id"]
    detail = answer.json()["detail"]
    for text in says:
        assert text in detail, detail
    assert "Traceback" not in detail


POLICY = {"logprobs": [-1.0] * 4, "advantages": [1.0] * 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": [1, -5], "target_tokens": [1, 2]}, ["-5", "vocabulary"]),
        ({"tokens": [1, 10**7], "target_tokens": [1, 2]}, ["10000000", "vocabulary"]),
        ({"target_tokens": [1, 2, 3, 10**7]}, ["10000000", "vocabulary"]),
        ({"target_tokens": [1, 2, 3]}, ["length 3", "4 tokens"]),
        ({"weights": [1.0, 1.0]}, ["weights", "must match"]),
        ({"weights": [float("nan")] * 4}, ["weights", "nan", "finite"]),
        ({"loss": "ppo", **POLICY, "advantages": [float("inf")] * 4}, ["advantages", "inf"]),
        ({"loss": "ppo", **POLICY, "logprobs": [float("nan")] * 4}, ["logprobs", "nan"]),
        ({"loss": "ppo", "advantages": [1.0] * 4}, ["logprobs is missing"]),
        ({"loss": "ppo", **POLICY, "config": {"clip": 1.0}}, ["clip", "clip_low_threshold"]),
        ({"loss": "dro", **POLICY, "config": {"beta": float("nan")}}, ["beta", "finite"]),
        ({"loss": "nll"}, ["nll", "cross_entropy"]),
        ({"loss": "gspo"}, ["gspo", "not implemented"]),
        ({"loss": "stable_reinforce"}, ["stable_reinforce", "not implemented"]),
        ({"tokens": [], "target_tokens": []}, ["no tokens"]),
    ],
)
def test_training_data_out_of_range(client, change, says):
    assert_refused(client.post("/forward_backward", client.train_body(**change)), 400, *says)
    client.assert_run_works()


def test_empty_data(client):
    body = client.of_run(forward_backward_input={"data": [], "loss_fn": "cross_entropy"})
    assert_refused(client.post("/forward_backward", body), 400, "empty")
    client.assert_run_works()


def test_image_chunks(client):
    body = client.train_body()
    image = {"type": "image", "data": "", "format": "png"}
    body["forward_backward_input"]["data"][0]["model_input"]["chunks"].append(image)
    assert_refused(client.post("/forward_backward", body), 400, "image", "encoded_text")
    client.assert_run_works()


def test_training_datum_longer_than_the_context(client):
    tokens = [5] * (client.base["max_context_length"] + 1)
    answer = client.post("/forward_backward", client.train_body(tokens))
    assert_refused(answer, 400, str(client.base["max_context_length"]))
    client.assert_run_works()


@pytest.mark.parametrize(
    ("adam", "says"),
    [
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"learning_rate": float("inf")}, ["learning_rate", "finite"]),
        ({"learning_rate": -1.0}, ["learning_rate", "negative"]),
        ({"beta1": 1.0}, ["beta1", "[0, 1)"]),
        ({"eps": float("nan")}, ["eps", "finite"]),
        ({"momentum": 0.9}, ["momentum", "unknown"]),
    ],
)
def test_adam_params(client, adam, says):
    assert_refused(client.post("/optim_step", client.of_run(adam_params=adam)), 400, *says)
    client.assert_run_works()


def test_another_optimizer(client):
    given = {"type": "dimuon", "learning_rate": 0.1}
    body = client.of_run(optimizer_params=given)
    assert_refused(client.post("/optim_step", body), 400, "dimuon", "adamw")
    body = client.model_body(5, optimizer_config={"type": "dimuon", "version": 1})
    assert_refused(client.post("/create_model", body), 400, "dimuon")
    client.assert_run_works()


@pytest.mark.parametrize("rank", [0, -1, 129, 10**9])
def test_rank(client, rank):
    body = client.model_body(6, lora_config={"rank": rank})
    assert_refused(client.post("/create_model", body), 400, "rank", "1 to", str(rank))


def test_unknown_base_names_the_resident_ones(client):
    answer = client.post("/create_model", client.model_body(6, base_model="acme/nothing"))
    assert_refused(answer, 404, "acme/nothing", client.base["model_name"])


@pytest.mark.parametrize("policy", ["../x", "a/b", "x" * 300, "A B", ""])
def test_policy_names(client, policy):
    body = client.model_body(6, user_metadata={"policy": policy})
    assert_refused(client.post("/create_model", body), 400, "policy name")


@pytest.mark.parametrize("name", ["a/b", "..", "../../etc/passwd", "nul\0", "x" * 300, ""])
@pytest.mark.parametrize(
    "path", ["/save_weights", "/save_weights_for_sampler", "/save_weights_external"]
)
def test_checkpoint_names(client, path, name):
    assert_refused(client.post(path, client.of_run(path=name)), 400, "path")
    client.assert_run_works()


def test_ttl_out_of_range(client):
    body = client.of_run(path="short", ttl_seconds=5)
    assert_refused(client.post("/save_weights", body), 400, "ttl_seconds", "3600")


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("tinker://nobody:train:0/weights/x", 404, "nobody"),
        ("tinker://a/b", 400, "tinker://<run_id>/<segment>/<name>"),
        ("/etc/passwd", 400, "tinker://"),
        ("tinker://x/pickles/y", 400, "pickles"),
    ],
)
def test_unknown_paths(client, path, status, says):
    body = client.of_run(path=path, optimizer=False)
    assert_refused(client.post("/load_weights", body), status, says)
    bound = {"session_id": client.session, "sampling_session_seq_id": 99, "model_path": path}
    assert_refused(client.post("/create_sampling_session", bound), status, says)
    assert_refused(client.post("/weights_info", {"tinker_path": path}), status, says)
    client.assert_run_works()


@pytest.mark.parametrize(
    ("params", "changes", "says"),
    [
        ({"temperature": -1.0}, {}, ["temperature", "-1"]),
        ({"temperature": float("nan")}, {}, ["temperature", "nan"]),
        ({"top_p": 0.0}, {}, ["top_p"]),
        ({"top_p": 1.5}, {}, ["top_p", "1.5"]),
        ({"top_k": 0}, {}, ["top_k", "-1"]),
        ({"max_tokens": 0}, {}, ["max_tokens"]),
        ({"max_tokens": 10**9}, {}, ["max_tokens", "at most"]),
        ({"stop": [""]}, {}, ["stop"]),
        ({"stop": [10**9]}, {}, ["stop", "1000000000"]),
        ({"seed": -1}, {}, ["seed"]),
        ({"penalty": 1.0}, {}, ["penalty", "unknown"]),
        ({}, {"num_samples": 0}, ["num_samples", "256"]),
        ({}, {"num_samples": 257}, ["num_samples", "256"]),
        ({}, {"topk_prompt_logprobs": -1}, ["topk_prompt_logprobs"]),
        ({}, {"prompt_logprobs_last_n": 2}, ["prompt_logprobs_last_n"]),
        ({}, {"prompt_alt_tokens_k": 101}, ["prompt_alt_tokens_k", "100"]),
        ({}, {"record_stability_info": True}, ["record_stability_info"]),
        ({}, {"tokens": []}, ["empty"]),
        ({}, {"tokens": [-1]}, ["-1", "vocabulary"]),
    ],
)
def test_sampling_parameters(client, params, changes, says):
    assert_refused(
        client.post("/asample", client.sample_body(params=params, **changes)), 400, *says
    )


def test_prompt_longer_than_the_context(client):
    length = client.base["max_context_length"]
    answer = client.post("/asample", client.sample_body([5] * (length + 1)))
    assert_refused(answer, 400, str(length), str(length + 1))


def test_image_prompt(client):
    prompt = {"chunks": [{"type": "image_asset_pointer", "location": "x", "format": "png"}]}
    assert_refused(client.post("/asample", client.sample_body(prompt=prompt)), 400, "image")


def test_same_seq_id_with_another_body_is_422_and_with_the_same_the_same_future(client):
    body = client.train_body()
    first = client.post("/forward_backward", body)
    again = client.post("/forward_backward", body)
    assert first.json()["request_id"] == again.json()["request_id"]
    given = body["forward_backward_input"]
    changed = {**body, "forward_backward_input": {**given, "data": given["data"] * 2}}
    assert_refused(client.post("/forward_backward", changed), 422, str(body["seq_id"]))
    sample = client.sample_body()
    first, again = client.post("/asample", sample), client.post("/asample", sample)
    assert first.json() == again.json()
    assert_refused(client.post("/asample", {**sample, "num_samples": 2}), 422, "seq_id")
    client.assert_run_works()


def test_a_sampler_save_that_is_sent_again_may_have_drawn_another_number(client):
    """As the SDK's does after a connection was lost."""
    body = client.of_run(sampling_session_seq_id=7, kind="snapshot")
    first = client.post("/save_weights_for_sampler", body)
    again = client.post("/save_weights_for_sampler", {**body, "sampling_session_seq_id": 8})
    assert again.json()["request_id"] == first.json()["request_id"]
    assert client.result(again)["sampling_session_id"] == f"{client.session}:sample:7"
    changed = {**body, "kind": "inflight"}
    assert_refused(client.post("/save_weights_for_sampler", changed), 422, str(body["seq_id"]))


def test_a_taken_checkpoint_name(client):
    assert "path" in client.result(client.post("/save_weights", client.of_run(path="taken")))
    assert_refused(client.post("/save_weights", client.of_run(path="taken")), 422, "overwrite")
    body = client.of_run(path="taken", overwrite=True)
    assert "path" in client.result(client.post("/save_weights", body))
    client.assert_run_works()


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/optim_step", {"adam_params": {"learning_rate": -1.0}}),
        ("/optim_step", {"adam_params": {"momentum": 0.9}}),
        ("/forward_backward", {}),
        ("/forward_backward", {"forward_backward_input": {"data": 7}}),
        ("/save_weights", {"path": "short", "ttl_seconds": 5}),
        ("/save_weights_for_sampler", {"kind": "other"}),
        ("/save_weights_external", {}),
        ("/load_weights", {"path": "tinker://x/weights/y", "weights_access_token": "x"}),
        ("/load_weights", {"path": 3}),
    ],
)
def test_a_refused_request_does_not_delay_the_next(client, path, fault):
    assert_refused(client.post(path, client.of_run(**fault)), 400)
    started = time.monotonic()
    client.assert_run_works()
    assert time.monotonic() - started < 4


def test_a_faulty_body_uses_up_no_seq_id_of_another_tenants_run(client, other):
    fault = client.of_run(adam_params={"momentum": 0.9})
    assert_refused(other.post("/optim_step", fault), 400, "momentum")
    updated = client.post("/optim_step", {**fault, "adam_params": {}})
    assert "error" not in client.result(updated)


@pytest.mark.parametrize("key", [None, "", "tml-om_none_none", "tml-" + "x" * 5000, "\xff"])
def test_unknown_keys_get_one_answer(server, key):
    headers = {} if key is None else {"X-API-Key": key.encode("latin-1")}
    answer = httpx.get(f"{server.url}/api/v1/sessions", headers=headers)
    assert_refused(answer, 401, "key")


def test_another_tenants_ids_are_not_found(client, other):
    body = client.train_body()
    request_id = client.post("/forward_backward", body).json()["request_id"]
    sample = client.sample_body()
    assert_refused(other.post("/forward_backward", body), 404)
    assert_refused(other.post("/retrieve_future", {"request_id": request_id}), 404)
    assert_refused(other.post("/cancel_future", {"request_id": request_id}), 404)
    assert_refused(other.post("/asample", sample), 404)
    assert_refused(other.post("/session_heartbeat", {"session_id": client.session}), 404)
    assert_refused(other.post(f"/sessions/{client.session}/finish", {}), 404)
    assert_refused(other.post("/create_model", {**client.model_body(9)}), 404)
    assert_refused(other.post("/get_info", {"model_id": client.run}), 404)
    for path in (
        f"/sessions/{client.session}",
        f"/training_runs/{client.run}",
        f"/training_runs/{client.run}/checkpoints",
        f"/samplers/{client.sampler}",
        f"/sessions/{client.session}/trace_export",
    ):
        assert_refused(other.get(path), 404)
    client.assert_run_works()


def test_a_reading_key_cannot_train(server, client):
    reader = httpx.Client(headers={"X-API-Key": server.make_key("default", "read")})
    answer = reader.post(f"{server.url}/api/v1/create_model", json=client.model_body(9))
    assert_refused(answer, 403, "role 'read'")


@pytest.mark.parametrize(
    "body", [b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"model_id": 3}', b'{"a": ' * 500]
)
@pytest.mark.parametrize("path", ["/optim_step", "/asample", "/create_model", "/retrieve_future"])
def test_malformed_json(client, path, body):
    assert_refused(client.post(path, body), 400)


def test_malformed_protobuf(client):
    headers = {"Content-Type": "application/x-protobuf"}
    answer = client.http.post("/forward_backward", content=b"\xff" * 100, headers=headers)
    assert_refused(answer, 400, "protobuf")
    headers["Content-Encoding"] = "zstd"
    answer = client.http.post("/forward_backward", content=b"\xff" * 100, headers=headers)
    assert_refused(answer, 400, "zstd")
    client.assert_run_works()


def test_a_body_over_the_limit(client):
    answer = client.post("/forward_backward", b"x" * (64 * 1024 * 1024 + 1))
    assert_refused(answer, 413, "67108864")
    client.assert_run_works()


def test_unknown_route_and_method(client):
    assert_refused(client.get("/nothing"), 404)
    assert_refused(client.get("/optim_step"), 405)


def test_finished_session_is_gone(server):
    client = Client(server, server.admin_key)
    assert client.post(f"/sessions/{client.session}/finish", {}).status_code == 204
    heartbeat = client.post("/session_heartbeat", {"session_id": client.session})
    assert_refused(heartbeat, 410, client.session)
    assert_refused(client.post("/optim_step", client.of_run(adam_params={})), 410)
