import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from openmint.service.choices import ChoiceText
from openmint.service.tokenizers import Tokenizer
from openmint.types import TopLogprobs
from openmint.wire.openai import Choice


def bytes_as_tokens() -> tokenizers.Tokenizer:
    """A tokenizer without merges: each byte is a token, so that characters come in pieces."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


TOKENIZER = Tokenizer(bytes_as_tokens(), None, {})
EOS = 1


def run(tokens: list[int], stops: tuple[str, ...] = (), per_step: int = 1) -> list[Choice]:
    """Every piece that a client sees when tokens come `per_step` at a time."""
    text = ChoiceText(0, TOKENIZER, stops, frozenset({EOS}))
    pieces = []
    for at in range(0, len(tokens), per_step):
        step = tokens[at : at + per_step]
        pieces.append(text.feed(step, [-1.0] * len(step), None))
    pieces.append(text.finish("length"))
    return [piece for piece in pieces if piece is not None]


def joined(pieces: list[Choice]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER.encode(text)]


@pytest.mark.parametrize("per_step", [1, 3, 1000])
def test_text_ends_before_the_first_stop(per_step: int) -> None:
    pieces = run(tokens_of("one two STOP three HALT"), ("HALT", "STOP"), per_step)
    assert joined(pieces) == "one two "
    assert pieces[-1].finish_reason == "stop"


def test_a_stop_that_does_not_come_is_shown_in_the_end() -> None:
    pieces = run(tokens_of("almost STO"), ("STOP",))
    assert joined(pieces) == "almost STO"
    assert pieces[-1].finish_reason == "length"
    assert not any("S" in piece.text for piece in pieces[:-1])


@given(
    st.text(alphabet="ab🎉é ", max_size=30),
    st.lists(st.text(alphabet="ab🎉", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_streamed_text_is_the_text_up_to_the_first_stop(
    text: str, stops: list[str], per_step: int
) -> None:
    pieces = run(tokens_of(text), tuple(stops), per_step)
    ends = [text.find(stop) for stop in stops if stop in text]
    # The first stop to be complete wins, and of those that one token completes the leftmost.
    shown = joined(pieces)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert (shown == text) if not ends else (len(shown) in ends)
    offsets = [piece.text_offset for piece in pieces]
    assert offsets == sorted(offsets)
    for piece in pieces:
        piece.text.encode()


def test_the_end_token_is_neither_text_nor_logprob() -> None:
    pieces = run([*tokens_of("hi"), EOS])
    assert joined(pieces) == "hi"
    assert [token.text for piece in pieces for token in piece.tokens] == ["h", "i"]


def test_a_character_that_is_cut_by_the_length_is_dropped() -> None:
    tokens = tokens_of("a🎈")
    pieces = run(tokens[:-1])
    assert joined(pieces) == "a"
    assert [token.raw for piece in pieces for token in piece.tokens] == [b"a"]


def test_logprobs_come_with_the_text_they_belong_to() -> None:
    pieces = run(tokens_of("x STOP"), ("STOP",))
    assert "".join(token.text for piece in pieces for token in piece.tokens) in ("x ", "x")
    for piece in pieces:
        assert "STOP".find("".join(token.text for token in piece.tokens).strip()) <= 0


def test_alternatives_skip_empty_cells() -> None:
    text = ChoiceText(0, TOKENIZER, (), frozenset())
    a, b = tokens_of("a") + tokens_of("b")
    top = TopLogprobs(np.array([[a, b]]), np.array([[-0.5, -np.inf]], dtype=np.float32))
    shown = text.feed([a], [-0.5], top)
    assert shown is not None and shown.tokens[0].top == (("a", b"a", -0.5),)


def test_every_generated_token_counts() -> None:
    text = ChoiceText(0, TOKENIZER, ("b",), frozenset({EOS}))
    text.feed([*tokens_of("abc"), EOS], [-1.0] * 4, None)
    assert text.num_tokens == 4
