"""A worker's engine and scheduler in this process, on models small enough to check by hand."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from openmint.config import WorkerConfig
from openmint.engine.engine import Engine
from openmint.engine.formats import AdapterArchive
from openmint.journal.update_log import NoLog, UpdateLog
from openmint.layers.ranks import UNDIVIDED, Division
from openmint.models.loader import load_model
from openmint.residency.decisions import Decision
from openmint.scheduler.scheduler import Scheduler
from openmint.scheduler.work import (
    Command,
    CreateRun,
    Delta,
    Done,
    ExportRun,
    Failed,
    SampleResult,
    SampleWork,
    Submit,
    ToGateway,
    TrainWork,
)
from openmint.store.folder_store import FolderStore
from openmint.types import (
    BaseInfo,
    Datum,
    Digest,
    IntArray,
    LoraSpec,
    LossSpec,
    RunId,
    SamplingParams,
    Tenant,
)

VOCAB = 160
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
}
"""Dense ones; of these and `MIXTURES`, names of config classes and what else they need."""
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
INDEXED = {"index_topk": 8, "index_n_heads": 16, "index_head_dim": 16}
"""Fewer index heads have scores of exactly zero, and ties break by the length of a batch."""
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "minimax-m2": (
        "MiniMaxM2Config",
        {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "glm4-moe": ("Glm4MoeConfig", {**ROUTED, "head_dim": 8, "use_qk_norm": True}),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, **ROUTED}),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", {**LATENT, **ROUTED}),
    "deepseek-v3.2": ("DeepseekV32Config", {**LATENT, **ROUTED, **INDEXED}),
    "glm-5": (
        "GlmMoeDsaConfig",
        {**LATENT, **ROUTED, **INDEXED, "indexer_types": ["full", "shared", "full"]},
    ),
}
ALL_FAMILIES = {**FAMILIES, **MIXTURES}
MODULES = {
    "attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "unembed": ["lm_head"],
}
"""What `peft` calls the target groups of the dense family."""


def random_model(family: str, directory: Path) -> Path:
    """A saved random model whose every parameter, norms and biases included, matters."""
    name, extra = ALL_FAMILIES[family]
    given = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }
    config = getattr(transformers, name)(**given)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            spread = 0.15 if parameter.ndim > 1 else 0.3
            parameter.data.add_(spread * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return directory


def reference(directory: Path) -> Any:
    """The `transformers` model of the same folder, fp32, eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


class Noted:
    """Keeps decisions to be looked at."""

    def __init__(self) -> None:
        self.all: list[Decision] = []

    def note(self, decision: Decision) -> None:
        self.all.append(decision)

    def flush(self) -> None:
        pass


class Workbench:
    """Submit commands, run the loop until it is idle, look at the answers."""

    def __init__(
        self,
        directory: Path,
        store: Path,
        journal: Path | None = None,
        division: Division = UNDIVIDED,
        **config: Any,
    ) -> None:
        """With a `division` every rank has one and is asked the same."""
        self.config = WorkerConfig(**{"dtype": "float32", "kv_cache_bytes": 2**20, **config})
        digest = Digest("sha256:" + "0" * 64)
        self.model, self.base = load_model("tiny", directory, digest, self.config, division)
        self.engine = Engine(self.model, self.base, self.config)
        self.blobs = FolderStore(store)
        archive = AdapterArchive(self.blobs, self.base)
        self.answers: dict[int, ToGateway] = {}
        self.deltas: list[Delta] = []
        self._ended: list[Callable[[], None]] = []
        self.decisions = Noted()
        self.updates = journal and UpdateLog(journal, digest, self._ended.append)
        self.scheduler = Scheduler(
            self.engine,
            archive,
            self.updates or NoLog(),
            self.decisions,
            self.config,
            decode_text,
            self._receive,
            self._background,
        )
        self._work_id = 0

    def submit(self, command: Command) -> int:
        self._work_id += 1
        self.scheduler.submit(Submit(self._work_id, command))
        return self._work_id

    def run(self) -> None:
        """Until nothing is queued. Fails the test when the loop stands still with work left."""
        while not self.scheduler.is_idle:
            progressed = bool(self._ended)
            while self._ended:
                self._ended.pop(0)()
            if not (self.scheduler.step() or progressed or self._ended):
                assert self.updates, "the loop stands still"
                time.sleep(0.0005)  # the log's own thread writes

    def do(self, command: Command) -> Any:
        """The command's result; raises its error."""
        work_id = self.submit(command)
        self.run()
        return self.result(work_id)

    def result(self, work_id: int) -> Any:
        answer = self.answers[work_id]
        if isinstance(answer, Failed):
            raise answer.error
        assert isinstance(answer, Done)
        return answer.result

    def trained(self, run: str, spec: LoraSpec, seed: int, scale: float = 0.05) -> RunId:
        """A run whose B isn't zero, so that its adapter does something."""
        run_id = RunId(run)
        self.do(CreateRun(run_id, Tenant("t"), spec, seed))
        live = self.engine.runs[run_id]
        generator = torch.Generator().manual_seed(seed)
        params_P = live.share_state().params_P.cpu().clone()  # the same values for every device
        for _, b_RO in live.shard.whole.views(params_P).values():
            b_RO.normal_(0.0, scale, generator=generator)
        own_P = live.shard.take(params_P).to(self.base.device)
        live.set_state(type(live.state).fresh(own_P))
        return run_id

    def revision(self, run: str, spec: LoraSpec, seed: int, scale: float = 0.05) -> Digest:
        """A resident revision of a fresh run."""
        run_id = self.trained(run, spec, seed, scale)
        saved = self.do(ExportRun(run_id, Tenant("t"), keep_resident=True))
        digest: Digest = saved.digest
        return digest

    def sample(
        self, prompt: IntArray, revision: Digest | None = None, **params: Any
    ) -> SampleResult:
        given = {"max_tokens": 12, "temperature": 0.0, **params}
        return self.do(SampleWork(Tenant("t"), revision, prompt, SamplingParams(**given)))

    def _receive(self, message: ToGateway) -> None:
        if isinstance(message, Delta):
            self.deltas.append(message)
        elif isinstance(message, Done | Failed):
            assert message.work_id not in self.answers, "answered twice"
            self.answers[message.work_id] = message

    def _background(
        self, job: Callable[[], Any], then: Callable[[Any, Exception | None], None]
    ) -> None:
        try:
            value, error = job(), None
        except Exception as failure:
            value, error = None, failure
        self._ended.append(lambda: then(value, error))


def decode_text(tokens: list[int]) -> str:
    """A stand-in alphabet: token 10 reads `a`, 11 reads `b`, and so on."""
    return "".join(chr(ord("a") + (token - 10) % 26) for token in tokens)


def prompt_of(length: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(3, VOCAB, length)


def datum(length: int, seed: int, loss: str) -> Datum:
    """A random example with the inputs of a loss, some of its weights or advantages zero."""
    random = np.random.default_rng(seed)
    inputs: dict[str, Any] = {"target_tokens": random.integers(3, VOCAB, length)}
    values = random.normal(size=length).astype(np.float32)
    values[: length // 3] = 0.0
    if loss == "cross_entropy":
        inputs["weights"] = np.abs(values)
    else:
        inputs["advantages"] = values
        inputs["logprobs"] = (-4.0 + random.normal(size=length)).astype(np.float32)
    return Datum(random.integers(3, VOCAB, length), inputs)


def train_work(
    run_id: RunId, loss: str, lengths: tuple[int, ...], seed: int, **more: Any
) -> TrainWork:
    data = tuple(datum(length, seed * 100 + i, loss) for i, length in enumerate(lengths))
    forward_only = more.pop("forward_only", False)
    return TrainWork(run_id, Tenant("t"), data, LossSpec(loss, more), forward_only)


def peft_model(directory: Path, bench: Workbench, run_id: RunId) -> Any:
    """`peft` on the reference model, with the run's current weights."""
    import peft

    run = bench.engine.runs[run_id]
    spec = run.layout.spec
    modules = [name for group in spec.groups for name in MODULES[group]]
    config = peft.LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=modules)
    with warnings.catch_warnings():
        # Tied weights matter when an adapter is merged; here lm_head only runs forward.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = peft.get_peft_model(reference(directory), config)
    parameters = dict(model.named_parameters())
    for path, (a_RI, b_RO) in run.weights.views.items():
        parameters[f"base_model.model.{path}.lora_A.default.weight"].data.copy_(a_RI)
        parameters[f"base_model.model.{path}.lora_B.default.weight"].data.copy_(b_RO.t())
    return model


def adapted(base: BaseInfo, spec: LoraSpec) -> int:
    """Parameters of an adapter, by the formula."""
    return sum(spec.rank * (t.num_in + t.num_out) for t in base.targets_of(spec))
