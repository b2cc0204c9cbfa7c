"""Text as it appears: joined it is the whole decoding, in whole characters, and nothing of a stop string comes."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from afina.engine.detokenizer import INCOMPLETE_CHARACTER, Detokenizer, detokenize
from helpers import tiny_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁a", "▁the", "a", "b", "th", "e", "€", "ñ", ".", "▁.", "\n"]


def with_bytes() -> PreTrainedTokenizerFast:
    """SentencePiece's way: ▁ for a space, tokens of one byte for what is in no piece."""
    names = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    core = Tokenizer(
        models.BPE(
            {name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_new_tokens() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.add_tokens(["<thought>", "ñandú"])
    return made


TOKENIZERS = {
    "byte-level": tiny_tokenizer(),
    "byte fallback": with_bytes(),
    "new tokens": with_new_tokens(),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def whole(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str] = ()
) -> list[str]:
    text = Detokenizer(tokenizer, stop)
    return [*map(text.add, tokens), text.end()]


@pytest.mark.slow
@each
@given(data=st.data())
def test_pieces_joined_are_the_whole_decoding_of_any_tokens(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.slow
@each
@given(written=st.text(max_size=40))
@example(written="👩‍👩‍👧 ¿qué? 漢字 \ufffd!")
def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerBase, written: str) -> None:
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    came = pieces(tokenizer, tokens)
    assert "".join(came) == whole(tokenizer, tokens)
    if INCOMPLETE_CHARACTER not in whole(tokenizer, tokens):
        assert not any(INCOMPLETE_CHARACTER in piece for piece in came)


def test_bytes_that_never_become_text_are_told_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    good, bad = (
        ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "b"],
        ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "b"],
    )
    assert pieces(tokenizer, tokenizer.convert_tokens_to_ids(good)) == ["a", "", "", "", "€b", ""]
    assert pieces(tokenizer, tokenizer.convert_tokens_to_ids(bad)) == [
        "a",
        "",
        "",
        "",
        "",
        INCOMPLETE_CHARACTER * 4 + "b",
        "",
    ]
    half = TOKENIZERS["byte-level"]
    tokens = half("a€")["input_ids"][:-1]
    assert "".join(pieces(half, tokens)) == whole(half, tokens) == "a" + INCOMPLETE_CHARACTER
    assert "".join(pieces(half, tokens)[:-1]) == "a"


def test_a_special_token_between_bytes_is_taken_out_as_the_decoder_does() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    for names in (
        ["<0xE2>", "<0x82>", "<0xAC>", "</s>", "<0xFF>", "b"],
        ["<0xC3>", "<s>", "<0xB1>"],
    ):
        tokens = tokenizer.convert_tokens_to_ids(names)
        assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


# stop strings


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is whole first, found character by character."""
    for end in range(len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)]
    return text


@pytest.mark.slow
@each
@given(
    written=st.text("ab.ñ€ ", max_size=30),
    stop=st.lists(st.text("ab.ñ€ ", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example(written="aab.", stop=["aab.", "ab"])
@example(written="abab", stop=["abb", "ba"])
def test_nothing_of_a_stop_string_comes(
    tokenizer: PreTrainedTokenizerBase, written: str, stop: list[str]
) -> None:
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    text, came = Detokenizer(tokenizer, stop), ""
    expected = cut(whole(tokenizer, tokens), stop)
    for token in tokens:
        came += text.add(token)
        assert expected.startswith(came), "text came that belongs to the stop string, or after it"
        if text.stopped:
            break
    came += text.end()
    assert came == expected == detokenize(tokenizer, tokens, stop)
    assert text.stopped == any(string in whole(tokenizer, tokens) for string in stop)


def test_what_could_be_a_stop_string_waits_and_then_comes() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = tokenizer.convert_tokens_to_ids(["a", "th", "e", "b", "th"])
    assert pieces(tokenizer, tokens, ["then"]) == ["a", "", "", "theb", "", "th"]
    assert pieces(tokenizer, tokens, ["the", ""]) == ["a", "", "", "", "", ""]
    text = Detokenizer(tokenizer, ["the"])
    assert [(text.add(token), text.stopped) for token in tokens[:3]] == [
        ("a", False),
        ("", False),
        ("", True),
    ]
