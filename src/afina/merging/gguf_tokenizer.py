"""A tokenizer in a GGUF file: byte-level BPE, llama.cpp's "gpt2", or SentencePiece, its "llama".

Of byte-level BPE llama.cpp selects pre-tokenization rules by name and not by pattern; a tokenizer
whose rules have no name there would give other tokens, and is an error. llama.cpp does not
normalize Unicode (Qwen's tokenizer does): text that is not in form NFC gets other tokens there.
"""

import json
import re
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from afina.errors import BaseError
from afina.merging.gguf_sentencepiece import (
    UNRANKED,
    check_pieces,
    is_sentencepiece,
    piece_scores,
    space_prefix,
)

# names of rules by what tokenizer.json contains: (patterns in their order, `ignore_merges`)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (  # words that begin in upper case or in any; the endings of English where it has them
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(end)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(end)s"
    r"|%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = CASED % {"end": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": r"\p{N}{1,3}"}
TEKKEN = CASED % {"end": "", "digits": r"\p{N}"}
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((WORDS % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((WORDS % r"\p{N}",), False): "qwen2",
    ((GPT4O,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
}
# tokens of Phi-3 after which llama.cpp does not strip white space; after the others it does
PHI3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class GGUFTokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    ADDED = 4
    UNUSED = 5
    BYTE = 6


def add_tokens(
    writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, stops: frozenset[int]
) -> None:
    """Write the tokenizer with its special tokens, its chat template and a stop token.

    Args:
        writer: The file.
        tokenizer: The tokenizer.
        rows: Number of embeddings of the model.
        stops: Token ids that end a completion; besides end of text llama.cpp has two, of a turn
            and of a message.

    Raises:
        BaseError: llama.cpp would split text differently, or `stops` has too many tokens.
    """
    content = _read(tokenizer)
    name = tokenizer.name_or_path
    texts, kinds = _vocabulary(content, name, rows)
    if is_sentencepiece(content):
        _add_pieces(writer, tokenizer, content, texts)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rules(content, name))
        pairs = content["model"]["merges"]
        writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in pairs])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    tokens = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokens[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokens[-1] == tokenizer.eos_token_id)
    ends = sorted(stops - {tokenizer.eos_token_id})
    if len(ends) > 2:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ends)))
        why = f"a GGUF file has two stop tokens besides end of text, and these are more: {names}"
        raise _unsupported(name, why)
    for end, add in zip(ends, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(end)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(portable(str(tokenizer.chat_template)))


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a name by which llama.cpp strips white space after special tokens, or does not.

    It does so, as Phi-3's tokenizer does, where the name has "phi-3" or "phi3".
    """
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if not strips:
        return re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE)
    return name if re.search("phi-?3", name, re.IGNORECASE) else f"phi-3 {name}"


def _add_pieces(
    writer: Any, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], texts: list[str]
) -> None:
    """Write what SentencePiece's tokenizers have: scores, and a space in front or not."""
    try:
        prefix = space_prefix(content, tokenizer.chat_template is not None)
        check_pieces(tokenizer, content, prefix)
    except ValueError as error:
        raise _unsupported(tokenizer.name_or_path, str(error)) from None
    _check_marks(content, tokenizer.name_or_path)
    scores = piece_scores(content)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(text, UNRANKED) for text in texts])
    writer.add_add_space_prefix(prefix)


def portable(template: str) -> str:
    """Return a chat template without transformers' `generation` tags, which jinja does not have.

    A condition that is always true replaces them, so that white space is trimmed as before.
    """
    return GENERATION.sub(
        lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template
    )


def rules(content: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name of a tokenizer.json's rules; raise `BaseError` where it has none."""
    model, normal = content["model"], (content.get("normalizer") or {}).get("type", "NFC")
    if model["type"] != "BPE" or model.get("byte_fallback") or normal != "NFC":
        raise _unsupported(name, f"it is no byte-level BPE (a {model['type']} after {normal})")
    cuts = _cuts(content.get("pre_tokenizer"))
    found = NAMES.get((cuts, bool(model.get("ignore_merges"))))
    if found is None:
        raise _unsupported(
            name, f"llama.cpp has no name for its pre-tokenizer: {', '.join(cuts) or 'none'}"
        )
    _check_marks(content, name)
    return found


def _check_marks(content: dict[str, Any], name: str) -> None:
    """Raise `BaseError` where an added token takes white space with it, besides those of Phi-3."""
    tokens = content["added_tokens"]
    plain = [token["content"] for token in tokens if not token["rstrip"]]
    is_phi3 = is_sentencepiece(content) and set(plain) == PHI3_PLAIN
    for token in tokens:
        if token["lstrip"] or token["single_word"] or (token["rstrip"] and not is_phi3):
            why = f"its token {token['content']!r} has lstrip, rstrip or single_word"
            raise _unsupported(name, why)


def _cuts(step: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the patterns of a pre-tokenizer in their order; an unknown step as its JSON."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(cut for part in steps for cut in _cuts(part))
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cuts)}:
            return ("gpt-2",) if cuts else ()
        case {
            "type": "Split",
            "pattern": {"Regex": str(pattern)},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (pattern,)
        case None:
            return ()
    return (json.dumps(step),)


def _vocabulary(content: dict[str, Any], name: str, rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of each of `rows` tokens; those that the tokenizer lacks are unused."""
    texts, kinds = [f"[PAD{number}]" for number in range(rows)], [int(GGUFTokenType.UNUSED)] * rows
    named = [
        (number, text, GGUFTokenType.NORMAL) for text, number in content["model"]["vocab"].items()
    ]
    named += [
        (t["id"], t["content"], GGUFTokenType.CONTROL if t["special"] else GGUFTokenType.ADDED)
        for t in content["added_tokens"]
    ]
    unknown = content["model"].get("unk_token")
    for number, text, kind in named:
        if number >= rows:
            raise _unsupported(
                name,
                f"token {text!r} has id {number}, and the model has {rows:,} embeddings",
            )
        if is_sentencepiece(content) and (text == unknown or BYTE.fullmatch(text)):
            kind = GGUFTokenType.UNKNOWN if text == unknown else GGUFTokenType.BYTE
        texts[number], kinds[number] = text, int(kind)
    return texts, kinds


def _read(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer, with tokens that an adapter added."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise _unsupported(tokenizer.name_or_path, "it has no tokenizer.json")
    return dict(json.loads(core.to_str()))


def _unsupported(name: str, why: str) -> BaseError:
    hint = "--format hf, and llama.cpp's own convert_hf_to_gguf.py on that folder"
    return BaseError("this tokenizer cannot be written as GGUF", where=name, why=why, hint=hint)
