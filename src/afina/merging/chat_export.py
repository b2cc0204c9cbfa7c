"""Chat template and stop tokens of a run, in the files that other programs load.

    run  ──ChatFormat──>  tokenizer (chat_template.jinja), generation_config.json (eos_token_id)
                          GGUF: tokenizer.chat_template, tokenizer.ggml.eot_token_id

Arguments of the template become its defaults, as other programs know only its text.
"""

from pathlib import Path
from typing import Any

from afina.data.renderer import Renderer
from afina.errors import BaseError, DataError, MergeError
from afina.io.atomic import write_text
from afina.io.chat_format import ChatFormat
from afina.io.composition import recorded_base
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_tokenizer, resolve_model_dir

TEMPLATE_FILE = "chat_template.jinja"
PROBE_CHAT = (
    {"role": "user", "content": "A first question?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "A second question."},
)


def probe_chat(renderer: Renderer) -> list[int] | None:
    """Return the token ids of a chat of two turns; None where the template rejects it."""
    try:
        return renderer.prompt(PROBE_CHAT)
    except DataError:
        return None


def install_chat_format(base: CausalLM, chat_format: ChatFormat) -> Renderer:
    """Give the tokenizer and the generation config of a base what a run was trained with.

    Returns:
        The renderer of the run, as it was before.
    """
    renderer = Renderer(base.tokenizer, chat_format, base.max_positions)
    found = renderer.chat_format
    base.tokenizer.chat_template = found.exported_jinja  # type: ignore[assignment]
    config: Any = getattr(base.model, "generation_config", None)
    if config is not None:
        stops = sorted(renderer.stop_token_ids | known_stop_ids(config))
        config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    return renderer


def known_stop_ids(config: Any) -> set[int]:
    """Return the stop tokens of a generation config, which may be one, several or none."""
    known = getattr(config, "eos_token_id", None)
    return set() if known is None else {known} if isinstance(known, int) else set(known)


def check_chat_format(expected: list[int] | None, renderer: Renderer, merged: CausalLM) -> None:
    """Raise `MergeError` where a merged model has another chat format than the run.

    Args:
        expected: `probe_chat` of the run.
        renderer: The renderer of the run.
        merged: The merged model, loaded from its files.
    """
    reloaded = Renderer(merged.tokenizer, ChatFormat(), merged.max_positions)
    if probe_chat(reloaded) != expected:
        raise MergeError(
            "the merged model's chat template renders other tokens than that of the run",
            where=merged.name,
            hint="serve the adapter unmerged",
        )
    stops = known_stop_ids(merged.model.generation_config)
    if missing := renderer.stop_token_ids - stops:
        names = ", ".join(map(repr, merged.tokenizer.convert_ids_to_tokens(sorted(missing))))
        raise MergeError(f"the merged model does not stop at {names}", where=merged.name)


def export_tokenizer(adapter: Path, chat_format: ChatFormat, out: Path) -> None:
    """Write the chat template of an adapter, with the base's tokenizer where that can be found."""
    tokenizer, template = resolve_template(adapter, chat_format)
    if tokenizer is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(out)
    elif template is not None:
        write_text(out / TEMPLATE_FILE, template)


def resolve_template(
    adapter: Path, chat_format: ChatFormat, base: str | None = None
) -> tuple[Any, str | None]:
    """Return the tokenizer of an adapter's base and the text of the adapter's chat template.

    Args:
        adapter: The adapter.
        chat_format: How it was trained; a built-in template, or the tokenizer's, has no text yet.
        base: The base, if it is not that which the adapter records.

    Returns:
        The tokenizer, None where the base cannot be found, and the template, None without one.
    """
    recorded = recorded_base(adapter)
    name = str(base or recorded.get("name"))
    try:
        folder = resolve_model_dir(name, None if base else recorded.get("revision"))
        tokenizer = load_tokenizer(folder, name, trust_remote_code=False)
    except BaseError:
        return None, chat_format.exported_jinja
    return tokenizer, Renderer(tokenizer, chat_format, 1 << 30).chat_format.exported_jinja
