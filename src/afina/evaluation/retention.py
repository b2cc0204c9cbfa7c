"""Forgetting is measured on general text: the user's, or the built-in one. Nats a token."""

from pathlib import Path

from afina.adapters.active import ActiveAdapters
from afina.data import RETENTION_TEXT
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.models.causal_lm import CausalLM
from afina.objectives.language_data import tokenize_rows
from afina.objectives.language_modeling import mean_loss
from afina.objectives.prepared import BATCH_TOKENS

GENERAL_TOKENS = 8192  # enough for a standard error of about 0.03 nats on the built-in text


def retention_examples(base: CausalLM, file: Path | None = None) -> list[Example]:
    """General text as examples: that of `file`, or the built-in one (English and Spanish), spread over all of it."""
    rows = read_table(file or RETENTION_TEXT, SFT).rows
    renderer = Renderer(base.tokenizer, "plain", min(base.max_positions, 512))
    examples = tokenize_rows("pretrain", renderer, rows, None)
    kept, tokens = [], 0
    for example in examples[:: max(1, sum(len(e.token_ids) for e in examples) // GENERAL_TOKENS)]:
        kept.append(example)
        tokens += len(example.token_ids)
        if tokens >= GENERAL_TOKENS:
            break
    return kept


def retention_loss(base: CausalLM, route: ActiveAdapters | None, file: Path | None = None) -> float:
    """Mean loss on general text under `route`; an activated adapter acts on all of it, as if it had been invoked."""
    return mean_loss(
        base,
        retention_examples(base, file),
        BATCH_TOKENS,
        None if route is None else route.always_on(),
    )
