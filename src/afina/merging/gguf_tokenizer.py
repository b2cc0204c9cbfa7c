"""A tokenizer in a GGUF file: byte-level BPE, which llama.cpp calls "gpt2".

llama.cpp cuts text into words by rules that it knows by name and not by their pattern; a tokenizer whose rules have no
name there would give other tokens, and is refused. Unicode is not normalised there (Qwen's tokenizer does it first):
text that is not in form NFC already gives other tokens than here.
"""

import json
import re
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from afina.errors import BaseError

# the names of the rules, by how tokenizer.json writes them: (the cuts in their order, whether whole words skip the merges)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((WORDS % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((WORDS % r"\p{N}",), False): "qwen2",
}
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class GGUFTokenType(IntEnum):
    """What a token is, in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    CONTROL = 3
    ADDED = 4
    UNUSED = 5


def add_tokens(
    writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, template: str | None
) -> None:
    """Write the tokenizer, its special tokens and the chat template (jinja) for a model with `rows` embeddings.

    Raises `BaseError` where llama.cpp would cut text otherwise.
    """
    whole = _read(tokenizer)
    texts, kinds = _vocabulary(whole, tokenizer.name_or_path, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules(whole, tokenizer.name_or_path))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    )
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    tokens = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokens[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokens[-1] == tokenizer.eos_token_id)
    if template is not None:
        writer.add_chat_template(portable(template))


def portable(template: str) -> str:
    """A chat template without transformers' own marks of an answer, which other readers of jinja do not know.

    A condition that always holds takes their place, so that the white space around them is trimmed as before.
    """
    return GENERATION.sub(
        lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template
    )


def rules(whole: dict[str, Any], name: str) -> str:
    """llama.cpp's name of how a tokenizer.json cuts text into words; raises `BaseError` where it has none."""
    model, normal = whole["model"], (whole.get("normalizer") or {}).get("type", "NFC")
    if model["type"] != "BPE" or model.get("byte_fallback") or normal != "NFC":
        raise _closed(name, f"it is no byte-level BPE (a {model['type']} after {normal})")
    cuts = _cuts(whole.get("pre_tokenizer"))
    found = NAMES.get((cuts, bool(model.get("ignore_merges"))))
    if found is None:
        raise _closed(
            name, f"llama.cpp's name of its cuts is not known here: {', '.join(cuts) or 'none'}"
        )
    for token in whole["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _closed(
                name,
                f"its token {token['content']!r} takes in the white space around it, or stands alone",
            )
    return found


def _cuts(step: dict[str, Any] | None) -> tuple[str, ...]:
    """The cuts of a pre-tokenizer in their order; what is not known is told as it stands."""
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


def _vocabulary(whole: dict[str, Any], name: str, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of each of the model's `rows` tokens; those without a name are marked unused."""
    texts, kinds = [f"[PAD{number}]" for number in range(rows)], [int(GGUFTokenType.UNUSED)] * rows
    named = [
        (number, text, GGUFTokenType.NORMAL) for text, number in whole["model"]["vocab"].items()
    ]
    named += [
        (t["id"], t["content"], GGUFTokenType.CONTROL if t["special"] else GGUFTokenType.ADDED)
        for t in whole["added_tokens"]
    ]
    for number, text, kind in named:
        if number >= rows:
            raise _closed(
                name,
                f"its token {text!r} is number {number}, and the model has {rows:,} embeddings",
            )
        texts[number], kinds[number] = text, int(kind)
    return texts, kinds


def _read(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json of the tokenizer as it is now, with tokens that an adapter brought."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise _closed(tokenizer.name_or_path, "it has no tokenizer.json")
    return dict(json.loads(core.to_str()))


def _closed(name: str, why: str) -> BaseError:
    hint = "--format hf, and llama.cpp's own convert_hf_to_gguf.py on that folder"
    return BaseError("this tokenizer cannot be written as GGUF", where=name, why=why, hint=hint)
