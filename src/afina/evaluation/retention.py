"""Retention loss: the loss on general text, by which forgetting is measured, in nats per token."""

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

NUM_RETENTION_TOKENS = 8192  # standard error of about 0.03 nats on the built-in text


def retention_examples(base: CausalLM, file: Path | None = None) -> list[Example]:
    """Return evenly spread examples of `file`, or of the built-in text (English and Spanish)."""
    rows = read_table(file or RETENTION_TEXT, SFT).rows
    renderer = Renderer(base.tokenizer, "plain", min(base.max_positions, 512))
    examples = tokenize_rows("pretrain", renderer, rows, None)
    kept, tokens = [], 0
    total = sum(len(example.token_ids) for example in examples)
    for example in examples[:: max(1, total // NUM_RETENTION_TOKENS)]:
        kept.append(example)
        tokens += len(example.token_ids)
        if tokens >= NUM_RETENTION_TOKENS:
            break
    return kept


def retention_loss(base: CausalLM, active: ActiveAdapters, file: Path | None = None) -> float:
    """Return the mean loss on general text; activated adapters are active on all tokens."""
    return mean_loss(base, retention_examples(base, file), BATCH_TOKENS, active.always_on())
