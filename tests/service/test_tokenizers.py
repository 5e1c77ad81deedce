import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from openmint.errors import InvalidRequest
from openmint.service.tokenizers import TextDecoder, Tokenizer

CORPUS = [
    "The capital of France is Paris.",
    "naïve café — 東京 🎉",
    "1 + 2 = 3\n\n\tdef f(): pass",
] * 4
TEMPLATES = {
    "plain": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "tricky": (
        "{{- bos_token }}{% set ns = namespace(last='') %}\n"
        "{%- for m in messages %}\n    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "    {%- set ns.last = m.role %}[{{ m.role }}|{{ m.content | trim | tojson }}]\n"
        "{%- endfor %}\n{{ ns.last }}{{ '' if tools is none else raise_exception('no tools') }}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}"
    ),
}
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be  brief. <b>&amp;'\"</b>"},
        {"role": "user", "content": "naïve café 🎉\n"},
        {"role": "assistant", "content": " oui <|im_end|> "},
        {"role": "user", "content": "東京"},
    ],
]


def write_folder(folder: Path, tokenizer: tokenizers.Tokenizer, template: str | None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "ab": 5}
    vocabulary.update({f"<0x{byte:02X}>": 6 + byte for byte in range(256)})
    model = models.BPE(vocabulary, [("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base"), byte_level(), TEMPLATES["plain"])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_loading_and_encoding_import_no_torch(folder: Path) -> None:
    program = (
        "import sys; from openmint.service.tokenizers import Tokenizer;"
        f"t = Tokenizer.load({str(folder)!r});"
        "t.encode_chat([{'role': 'user', 'content': 'hi'}]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_chats_equal_transformers(
    template: str, messages: list[dict[str, str]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path / "base", byte_level(), TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer.load(folder)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered
    encoded = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages).tolist() == encoded
    for message in messages:
        assert ours.encode(message["content"]).tolist() == theirs.encode(message["content"])


@given(st.text(max_size=40))
def test_text_survives_tokens_and_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(st.lists(st.integers(2, 255), max_size=30))
def test_any_tokens_decode_as_the_library_decodes_them(make: object, tokens: list[int]) -> None:
    library = CACHED.setdefault(make, make())  # type: ignore[operator]
    ours = CACHED.setdefault((make, "ours"), Tokenizer(library, None, {}))
    decoded = ours.decode(tokens)
    theirs = library.decode(tokens, skip_special_tokens=True)
    if make is byte_level:
        assert decoded + "\ufffd" * (len(theirs) - len(decoded)) == theirs
    elif "\ufffd" not in theirs:
        assert decoded == theirs


CACHED: dict[object, object] = {}


def test_a_character_shows_only_when_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode("a🎈b").tolist()]
    assert "".join(pieces) == "a🎈b"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces


def test_special_and_unknown_tokens_add_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0, *tokenizer.encode("hi").tolist(), 1, 10_000_000, -1]) == "hi"
    assert tokenizer.token_bytes(1) == b"<|im_end|>"


def test_what_surely_cannot_fit_is_known_without_tokenizing(tokenizer: Tokenizer) -> None:
    assert tokenizer.cannot_fit(10_000_000, 1000)
    assert not tokenizer.cannot_fit(1000, 1000)


def test_a_template_that_refuses_is_a_clear_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer.load(write_folder(tmp_path / "base", byte_level(), template))
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        tokenizer.encode_chat(CHATS[0])


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer.load(write_folder(tmp_path / "base", byte_level(), template))
    with pytest.raises(InvalidRequest, match="unsafe"):
        tokenizer.encode_chat(CHATS[0])


def test_missing_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    tokenizer = Tokenizer.load(write_folder(tmp_path / "base", byte_level(), None))
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat(CHATS[0])
