"""Log-probabilities in the form of OpenAI's two APIs: text, bytes and logprob of each token."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from afina.engine.request import Logprob
from afina.models.causal_lm import CausalLM

MIN_LOGPROB = -9999.0  # OpenAI's value for probability 0, since JSON has no infinity


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's character for each byte, inverted: the alphabet of byte-level vocabularies."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


BYTE_DECODER = _byte_letters()


def token_bytes(base: CausalLM, token: int) -> bytes:
    """Return the bytes of one token, which may be part of a UTF-8 character."""
    text = str(base.tokenizer.decode([token], skip_special_tokens=False))
    raw = str(base.tokenizer.convert_ids_to_tokens(token))
    if "\N{REPLACEMENT CHARACTER}" in text:
        if raw.startswith("<0x") and raw.endswith(">"):
            return bytes([int(raw[3:-1], 16)])
        if all(letter in BYTE_DECODER for letter in raw):
            return bytes(BYTE_DECODER[letter] for letter in raw)
    elif raw.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece drops the space before a single token
    return text.encode()


def _one(base: CausalLM, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(base, token)
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(data),
    }


def chat_logprobs(base: CausalLM, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """Return `logprobs` of a choice of chat completions."""
    content = [
        _one(base, p.token, p.logprob)
        | {"top_logprobs": [_one(base, token, value) for token, value in p.top]}
        for p in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_and_text_logprobs(
    base: CausalLM,
    prompt: Sequence[int],
    prompt_logprobs: Sequence[Logprob],
    logprobs: Sequence[Logprob],
) -> dict[str, Any]:
    """Return `logprobs` of a choice with echo: the first token of the prompt has none."""
    first = token_bytes(base, prompt[0]).decode(errors="replace")
    rest = text_logprobs(base, [*prompt_logprobs, *logprobs], len(first))
    return {
        "tokens": [first, *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
        "text_offset": [0, *rest["text_offset"]],
    }


def text_logprobs(base: CausalLM, logprobs: Sequence[Logprob], start: int = 0) -> dict[str, Any]:
    """Return `logprobs` of a choice of completions; `start` is the first `text_offset`."""
    pieces = [token_bytes(base, p.token).decode(errors="replace") for p in logprobs]
    offsets = [*accumulate(map(len, pieces), initial=start)][:-1]
    top = [
        {
            token_bytes(base, token).decode(errors="replace"): max(value, MIN_LOGPROB)
            for token, value in p.top
        }
        for p in logprobs
    ]
    values = [max(p.logprob, MIN_LOGPROB) for p in logprobs]
    return {"tokens": pieces, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
