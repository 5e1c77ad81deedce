"""Text to tokens and back, as the base's Hugging Face folder says, without torch.

`transformers.AutoTokenizer` imports torch, so this reads `tokenizer.json` with the `tokenizers`
library and renders the chat template in a Jinja sandbox; a test holds both equal to AutoTokenizer.
A Tokenizer is immutable after `load` and may be used from any thread.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openmint.errors import InvalidRequest
from openmint.types import IntArray

INLINE_CHARS = 4096
"""Texts up to this length are tokenized on the event loop; it takes about a millisecond."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

ChatMessage = Mapping[str, str]


class Tokenizer:
    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: jinja2.Template | None,
        names: dict[str, str],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._names = names
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes_V = _bytes_of_tokens(tokenizer)
        self._longest_token_bytes = max(map(len, self._bytes_V), default=1)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder. Raises InvalidRequest without tokenizer.json."""
        folder = Path(directory)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequest(
                f"{folder} has no tokenizer.json; save the base with a fast tokenizer"
            )
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
        names = {name: _token_text(config.get(name)) for name in NAMED_TOKENS if config.get(name)}
        source = _template_source(folder, config)
        template = _environment().from_string(source) if source else None
        return cls(tokenizers.Tokenizer.from_file(str(path)), template, names)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> IntArray:
        """Tokens of a raw prompt, with the special tokens that the base puts around one."""
        return _ids(self._tokenizer.encode(text, add_special_tokens=True))

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a conversation, ready for the assistant's turn.

        Raises InvalidRequest when the base has no chat template, or its template refuses.
        """
        if self._template is None:
            raise InvalidRequest("this base has no chat template; use /v1/completions")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._names,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the base's chat template refuses messages: {error}") from None

    def encode_chat(self, messages: Sequence[ChatMessage]) -> IntArray:
        """Tokens of a conversation, ready for the assistant's turn."""
        text = self.render_chat(messages)
        return _ids(self._tokenizer.encode(text, add_special_tokens=False))

    def cannot_fit(self, num_bytes: int, max_tokens: int) -> bool:
        """Whether a text of `num_bytes` surely has more than `max_tokens` tokens, found cheaply."""
        return num_bytes > max_tokens * self._longest_token_bytes

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text: not always whole characters; empty when unknown."""
        return self._bytes_V[token] if 0 <= token < len(self._bytes_V) else b""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens; an unfinished last character is dropped."""
        decoder = TextDecoder(self)
        return "".join(decoder.feed(token) for token in tokens)


class TextDecoder:
    """Text of one growing token sequence, always whole characters; linear in its length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes. A special token adds nothing."""
        if token in self._tokenizer.special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))


class TokenizerCache:
    """The tokenizer of each base folder, loaded once."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, Tokenizer] = {}
        self._lock = asyncio.Lock()

    async def get(self, directory: str) -> Tokenizer:
        """The folder's tokenizer. Raises InvalidRequest when the folder has none."""
        if directory not in self._tokenizers:
            async with self._lock:
                if directory not in self._tokenizers:
                    loaded = await asyncio.to_thread(Tokenizer.load, directory)
                    self._tokenizers[directory] = loaded
        return self._tokenizers[directory]


def _ids(encoding: tokenizers.Encoding) -> IntArray:
    return np.asarray(encoding.ids, dtype=np.int64)


def _token_text(token: Any) -> str:
    """A token of tokenizer_config.json: plain text, or an object with its settings."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja set up as chat templates expect: the names and white space rules of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON; Jinja's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(layout: str) -> str:
    """Today by the server's clock, for templates that tell the model the date."""
    return datetime.now().astimezone().strftime(layout)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _bytes_of_tokens(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """For each token id the bytes it adds to a decoded text, by the kind of its decoder."""
    kinds = _decoder_kinds(json.loads(tokenizer.to_str())["decoder"])
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    table = [b""] * (max(vocabulary, default=-1) + 1)
    byte_of_char = _byte_of_char()
    for token, text in vocabulary.items():
        if token in added:
            table[token] = added[token].encode()
        elif "ByteLevel" in kinds:
            table[token] = _from_byte_level(text, byte_of_char)
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            table[token] = _from_sentencepiece(text)
        else:
            table[token] = text.encode()
    return table


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    parts = decoder.get("decoders", [])
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in parts))


def _from_byte_level(text: str, byte_of_char: Mapping[str, int]) -> bytes:
    if all(char in byte_of_char for char in text):
        return bytes(byte_of_char[char] for char in text)
    return text.encode()


def _from_sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this is the way back.

    Printable Latin-1 bytes stand for themselves, the others for U+0100 onwards in order.
    Source: the byte encoder of GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table
