"""From a Hugging Face folder to a resident model and the facts that the control plane needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from openmint.config import WorkerConfig
from openmint.errors import InvalidRequest
from openmint.layers.ranks import ALONE, UNDIVIDED, Division, meet
from openmint.models import deepseek, dense, gpt_oss, mixture
from openmint.models.model import Model
from openmint.models.quantized import dequantized
from openmint.models.weights import Module, Weights
from openmint.types import BaseInfo, Digest, stacks_of

FAMILIES: dict[str, Callable[[PretrainedConfig, Module], Model]] = {
    **dict.fromkeys(dense.ARCHITECTURES, dense.DenseModel),
    **dict.fromkeys(mixture.SOFTMAX, mixture.softmax_mixture),
    **dict.fromkeys(mixture.SIGMOID, mixture.sigmoid_mixture),
    **dict.fromkeys(mixture.MIXTRAL, mixture.mixtral),
    **dict.fromkeys(mixture.MINIMAX, mixture.minimax_m2),
    **dict.fromkeys(gpt_oss.ARCHITECTURES, gpt_oss.gpt_oss),
    **dict.fromkeys(deepseek.ARCHITECTURES, deepseek.deepseek),
}
"""Architecture names of config.json, and who computes them. A new family adds its line here."""

PUBLISHED_AS = {"kimi_k2": "deepseek_v3"}
"""Model types whose config.json asks for code of its own, and those that they are in truth."""
SERVING_WEIGHTS = ("same", "int8")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def divide(config: WorkerConfig, rank: int, meeting: Path, first_device: int) -> Division:
    """This rank's place among the worker's, once all of them have come to the file `meeting`. On
    GPUs it takes the one with its number, counted from `first_device`."""
    if config.device != "cpu":
        torch.cuda.set_device(first_device + rank)
    ranks = meet(rank, config.num_ranks, meeting, config.device)
    return Division(
        ranks if config.tensor_parallel > 1 else ALONE,
        ranks if config.expert_parallel > 1 else ALONE,
        ranks if config.data_parallel > 1 else ALONE,
    )


def load_model(
    name: str,
    directory: Path,
    digest: Digest,
    config: WorkerConfig,
    division: Division = UNDIVIDED,
) -> tuple[Model, BaseInfo]:
    """The base in `directory`, or this rank's part of it, resident on the configured device, and
    what to tell others of the whole.

    Raises InvalidRequest for an architecture, dtype, layout, quantization or division that is not
    supported.
    """
    if config.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise InvalidRequest(f"worker.dtype {config.dtype!r} is not supported; supported: {known}")
    hf_config = read_config(directory)
    architecture = architecture_of(hf_config)
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InvalidRequest(f"architecture {architecture!r} is not supported; supported: {known}")
    device = torch.device(config.device)
    if config.serving_weights not in SERVING_WEIGHTS:
        known, given = ", ".join(SERVING_WEIGHTS), config.serving_weights
        raise InvalidRequest(
            f"worker.serving_weights {given!r} is not supported; supported: {known}"
        )
    weights = dequantized(Weights(directory, DTYPES[config.dtype], device), hf_config)
    module = Module(weights, "", config.serving_weights == "int8", division)
    model = FAMILIES[architecture](hf_config, module)
    info = describe(model, hf_config, config, name=name, digest=digest, directory=str(directory))
    return model, replace(info, eos_token_ids=_eos_token_ids(directory, hf_config))


def read_config(path: Path) -> PretrainedConfig:
    """The config of a Hugging Face folder, or of a config.json.

    Raises InvalidRequest where there is none that `transformers` knows.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidRequest(
            f"there is no {file}; --base wants a Hugging Face folder, which holds a config.json"
        )
    try:
        values = json.loads(file.read_text())
        if values.get("model_type") in PUBLISHED_AS:
            values["model_type"] = PUBLISHED_AS[values["model_type"]]
            known = CONFIG_MAPPING[values["model_type"]]
            config: PretrainedConfig = known.from_dict(values)
        else:
            config = AutoConfig.from_pretrained(
                file, local_files_only=True, trust_remote_code=False
            )
        return config
    except (ValueError, AttributeError, StrictDataclassError) as error:
        raise InvalidRequest(f"{file} is no config that transformers knows: {error}") from None


def architecture_of(config: PretrainedConfig) -> str:
    return (config.architectures or ["unknown"])[0]


def describe(
    model: Model,
    hf_config: PretrainedConfig,
    config: WorkerConfig,
    *,
    name: str,
    digest: Digest,
    directory: str,
) -> BaseInfo:
    """What to tell others of a resident base that has this config; no token ends a completion."""
    targets = model.shards.targets
    num_params = sum(t.num_in * t.num_out for t in targets)
    return BaseInfo(
        name=name,
        digest=digest,
        architecture=architecture_of(hf_config),
        directory=directory,
        dtype=config.dtype,
        device=config.device,
        vocab_size=hf_config.vocab_size,
        context_length=hf_config.max_position_embeddings,
        eos_token_ids=(),
        num_params=num_params,
        weight_bytes=num_params * DTYPES[config.dtype].itemsize,
        max_rank=config.max_rank,
        stacks=stacks_of(targets),
    )


def _eos_token_ids(directory: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's, else the model config's."""
    eos = config.eos_token_id
    if (directory / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
