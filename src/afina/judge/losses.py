"""Forgetting is measured on general text: the user's, or the built-in one. Nats a token."""

import math
from pathlib import Path

from afina.base.model import Base
from afina.data.formats import read_table
from afina.data.general import GENERAL
from afina.data.template import Example, Renderer
from afina.objective.language import make_examples, mean_loss
from afina.route.invocation import Route

GENERAL_TOKENS = 8192  # enough for a standard error of about 0.03 nats on the built-in text
BATCH_TOKENS = 2048


def perplexity(loss: float) -> float:
    """e to the loss: how many equally likely tokens the model hesitates between."""
    return math.exp(min(loss, 700.0))


def general_examples(base: Base, file: Path | None = None) -> list[Example]:
    """General text as examples: that of `file`, or the built-in one (English and Spanish), spread over all of it."""
    rows = read_table(file or GENERAL).rows
    renderer = Renderer(base.tokenizer, "plain", min(base.context, 512))
    examples = make_examples("pretrain", renderer, rows, None)
    kept, tokens = [], 0
    for example in examples[:: max(1, sum(len(e.tokens) for e in examples) // GENERAL_TOKENS)]:
        kept.append(example)
        tokens += len(example.tokens)
        if tokens >= GENERAL_TOKENS:
            break
    return kept


def general_loss(base: Base, route: Route | None, file: Path | None = None) -> float:
    """Mean loss on general text under `route`; an activated adapter acts on all of it, as if it had been invoked."""
    return mean_loss(base, general_examples(base, file), BATCH_TOKENS, None if route is None else route.everywhere())
