"""Losses that judge: on held-out rows, on rows that were learned, on general text. Nats a labelled token."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from afina.base.model import Base
from afina.data.batches import flatten, pack
from afina.data.formats import read_table
from afina.data.template import Example, Renderer
from afina.objective.language import make_examples, token_loss
from afina.segments import Segments

GENERAL = Path(__file__).parent / "general.txt"
GENERAL_TOKENS = 8192  # enough for a standard error of about 0.02 nats on the built-in text


@torch.no_grad()
def held_out_loss(base: Base, examples: Sequence[Example], batch_tokens: int, segments: Segments) -> float:
    """Mean cross-entropy in nats over the labels of `examples`, the model routed by `segments`."""
    total, labels = 0.0, 0
    lengths = [len(example.tokens) for example in examples]
    with base.board.route(segments):
        for indices in pack(lengths, batch_tokens, range(len(examples))):
            batch = flatten([examples[i] for i in indices]).to(base.device)
            total += token_loss(base, batch).item()
            labels += batch.label_count
    return total / labels


def perplexity(loss: float) -> float:
    """e to the loss: how many equally likely tokens the model hesitates between."""
    return math.exp(min(loss, 700.0))


def general_examples(base: Base, file: Path | None) -> list[Example]:
    """The text on which forgetting is measured, as examples: the user's, or the built-in one (English and Spanish)."""
    rows = read_table(file or GENERAL).rows
    renderer = Renderer(base.tokenizer, "plain", min(base.context, 512))
    examples = make_examples("pretrain", renderer, rows, None)
    kept, tokens = [], 0
    step = max(1, sum(len(e.tokens) for e in examples) // GENERAL_TOKENS)  # spread over the whole text
    for example in examples[::step]:
        kept.append(example)
        tokens += len(example.tokens)
        if tokens >= GENERAL_TOKENS:
            break
    return kept
