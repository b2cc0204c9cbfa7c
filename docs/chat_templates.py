"""Write docs/chat_templates.md: what published chat templates make of chats, cell by cell.

    python docs/chat_templates.py

The templates are those that TRL ships in its package. Each renders the same chats; a cell is filled
in only after it was checked that every answer is trained once, after the tokens that generation is
given, up to its stop token.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from afina.data.answers import is_trained
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFTRow
from afina.errors import DataError

PAGE = Path(__file__).parent / "chat_templates.md"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# the control tokens that templates write; thoughts and calls are tokens of the vocabulary
MARKS = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|</?(?:s|start_of_turn|end_of_turn|end_of_utterance)>|<\|?turn\|?>"
    r"|<\|(?:think|channel|tool_call|tool_response|tool)>|<(?:channel|tool_call|tool_response)\|>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}

PARAGRAPHS = (
    "# Chat templates\n",
    "What the chat templates of published models make of five chats. "
    "This page is written by `python docs/chat_templates.py`.\n",
    "- **trained**: one example for the chat. Every answer is trained up to its stop token, and "
    "the tokens before it are those that generation is given.",
    "- **trained, 2 examples**: the template writes earlier turns otherwise once more follow, or "
    "opens an answer in its prompt; each answer is an example of its own, with the history as "
    "generation sees it.",
    "- **refused**: the template rejects the chat, or leaves out a part of it that would then not "
    "be learned. `--chat-template chatml` writes all of these chats.\n",
    "The chats are one turn, two turns, a turn with a system message, a call of a tool with its "
    "result, and two turns with `reasoning_content`. Where the answer of a template ends with the "
    "first token of the next turn, that is its stop token.\n",
)


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **more}


CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Lima"}},
}
TURN = (message("user", "1+1?"), message("assistant", "2"))
CHATS: dict[str, tuple[dict[str, Any], ...]] = {
    "one turn": TURN,
    "two turns": (*TURN, message("user", "And 2+2?"), message("assistant", "4")),
    "system": (message("system", "Be brief."), *TURN),
    "tools": (
        message("user", "Is it sunny in Lima?"),
        message("assistant", None, tool_calls=[CALL]),
        message("tool", "sunny", name="weather", tool_call_id="call00001"),
        message("assistant", "It is."),
    ),
    "reasoning": (
        message("user", "1+1?"),
        message("assistant", "2", reasoning_content="One and one."),
        message("user", "And 2+2?"),
        message("assistant", "4", reasoning_content="Two and two."),
    ),
}


def published() -> dict[str, str]:
    """Return published templates by name, without those that TRL changed for training."""
    files = sorted(TEMPLATES.glob("*.jinja"))
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in files
        if not file.stem.endswith("_training")
    }


def tokenizer_of(jinja: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose control tokens are those that a template writes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(set(MARKS.findall(jinja)))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special,
    )
    made.chat_template = jinja
    return made


def row_of(name: str) -> SFTRow:
    """Return one of the chats as a row."""
    return SFTRow(name, messages=CHATS[name], tools=(TOOL,) if name == "tools" else ())


def trained_spans(example: Example) -> list[tuple[int, int]]:
    """Return where the runs of target tokens begin and end."""
    mask = [False, *example.loss_mask, False]
    edges = [n for n in range(1, len(mask)) if mask[n] != mask[n - 1]]
    return [(start - 1, end - 1) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def check_promise(renderer: Renderer, row: SFTRow, examples: Sequence[Example]) -> None:
    """Check that each answer is trained once, after what generation is given, up to its stop."""
    assert row.messages is not None
    numbers = [n for n, one in enumerate(row.messages) if is_trained(n, one)]
    prompts = {n: renderer.prompt(row.messages[:n], tools=row.tools) for n in numbers}
    found = []
    for example in examples:
        for start, end in trained_spans(example):
            found += [n for n in numbers if prompts[n] == example.token_ids[:start]]
            assert example.token_ids[end - 1] in renderer.stop_token_ids
    assert sorted(found) == numbers, f"{row.where}: {found} of {numbers}"


def cell(renderer: Renderer, name: str) -> str:
    """Return what a template makes of a chat."""
    row = row_of(name)
    try:
        examples = renderer.examples(row)
    except DataError as error:
        rejected = "rejects these messages" in error.what
        reason = f"rejects: {error.why}" if rejected else error.what.partition(" template ")[2]
        return f"refused: {reason}".replace("|", "\\|")
    check_promise(renderer, row, examples)
    return "trained" if len(examples) == 1 else f"trained, {len(examples)} examples"


def table() -> str:
    """Return the page."""
    lines = [f"| template | stop tokens | {' | '.join(CHATS)} |", "|---" * (len(CHATS) + 2) + "|"]
    for name, jinja in published().items():
        renderer = Renderer(tokenizer_of(jinja), None, 1 << 20)
        stops = ", ".join(dict.fromkeys(f"`{s.text}`" for s in renderer.template.stops))
        cells = [cell(renderer, chat) for chat in CHATS]
        lines.append(f"| {' | '.join([name, stops.replace('|', chr(92) + '|'), *cells])} |")
    return "\n".join(lines)


def page() -> str:
    """Return the text of the page."""
    return "\n".join([*PARAGRAPHS, table(), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
