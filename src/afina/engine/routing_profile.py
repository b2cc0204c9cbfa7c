"""What an adapter is for, as a few points: means over the prompts that it learned from, as the base itself sees them.

    prompt --> states after block 0 (words) and after the middle one (sense), each the mean over its tokens --> (2 d)
    all prompts --> halved along their widest direction, again and again --> up to 16 groups --> their means

No text is kept, and every mean is over at least four prompts: one prompt's mean of word vectors would tell its words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afina.adapters.segments import NO_ADAPTERS
from afina.data.renderer import Renderer
from afina.errors import AdapterError
from afina.io.atomic import atomic_file
from afina.models.causal_lm import CausalLM

FILE = "profile.safetensors"
PROMPTS = 128  # of the adapter's training prompts
HALVINGS, LEAST = 4, 4  # up to 16 groups, of at least 4 prompts
LONGEST = 256  # tokens of a prompt that are read: its beginning and its end
BATCH_TOKENS = 2048


class Embedder(Protocol):
    """Prompts as vectors. `key` names what made them: points under different keys cannot be compared."""

    key: str

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Vectors (n, parts, d) in float32 of prompts in tokens, which are not empty."""


class PromptEmbedder:
    """Prompts as the base sees them, without any adapter: (n, 2, d)."""

    def __init__(self, base: CausalLM) -> None:
        self._base, self._layers = base, (0, base.num_layers // 2)
        self.key = f"{base.hash or base.name} blocks {self._layers[0]}, {self._layers[1]}"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Vectors (n, 2, d) in float32."""
        half = min(LONGEST, self._base.max_positions) // 2
        read = [list(p) if len(p) <= 2 * half else [*p[:half], *p[-half:]] for p in prompts]
        with self._base.forward_context.use(NO_ADAPTERS):
            return torch.cat([self._run(batch) for batch in _batches(read)])

    def _run(self, prompts: list[list[int]]) -> Tensor:
        base, bounds = self._base, (0, *accumulate(map(len, prompts)))
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=base.device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(base.device)
        states = base.layer_hidden_states(tokens, positions, bounds, self._layers).float()
        return torch.stack([piece.mean(0) for piece in states.tensor_split(bounds[1:-1])]).cpu()


def _batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for prompt in prompts:
        if batch and sum(map(len, batch)) + len(prompt) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around the last question: it says nothing of what is asked."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, renderer: Renderer) -> "ChatFrame":
        """The frame of the renderer's template."""
        if not renderer.uses_chat_template:
            return cls()
        first, second = renderer.prompt("one"), renderer.prompt("7 €")
        before, after = _shared(first, second), _shared(first[::-1], second[::-1])[::-1]
        tokenizer = renderer.tokenizer
        marks = [
            i
            for i, t in enumerate(before)
            if t in tokenizer.all_special_ids and t != tokenizer.bos_token_id
        ]
        start = marks[-1] if marks else int(before[:1] == [tokenizer.bos_token_id])
        return cls(tuple(before[start:]), tuple(after))

    def question(self, prompt: Sequence[int]) -> list[int]:
        """The tokens of the last question in a prompt of this template; the whole prompt where it has another form."""
        tokens, opening, closing = list(prompt), list(self.opening), list(self.closing)
        end = len(tokens) - len(closing)
        if not opening or tokens[end:] != closing:
            return tokens
        starts = range(end - len(opening), -1, -1)
        start = next(
            (i + len(opening) for i in starts if tokens[i : i + len(opening)] == opening), 0
        )
        return tokens[start:end] or tokens


def _shared(first: list[int], second: list[int]) -> list[int]:
    """The tokens with which both begin."""
    return [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    ]


def build_profile(embedding: Embedder, questions: Sequence[Sequence[int]]) -> Tensor | None:
    """The points (k, parts, d) that stand for an adapter's questions in tokens; None where there are fewer than four."""
    asked = [question for question in questions if question]
    asked = asked[:: max(1, len(asked) // PROMPTS)][:PROMPTS]
    if len(asked) < LEAST:
        return None
    vectors = embedding(asked)
    spread = vectors - vectors.mean(0)
    scaled = (spread / spread.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-12)).flatten(
        1
    )
    return torch.stack(
        [vectors[rows].mean(0) for rows in _halve(scaled, torch.arange(len(asked)), HALVINGS)]
    )


def _halve(points: Tensor, rows: Tensor, times: int) -> list[Tensor]:
    """The `rows` of points (n, D) in groups of equal size, cut along the widest direction of each."""
    if times == 0 or len(rows) < 2 * LEAST:
        return [rows]
    own = points[rows] - points[rows].mean(0)
    widest = torch.linalg.eigh(own @ own.T)[1][:, -1]  # the rows' places along it
    order, middle = rows[widest.argsort(stable=True)], len(rows) // 2
    return _halve(points, order[:middle], times - 1) + _halve(points, order[middle:], times - 1)


def write_profile(folder: Path, profile: Tensor, key: str) -> None:
    """Put the profile beside the adapter in `folder`."""
    with atomic_file(folder / FILE) as file:
        save_file({"points": profile.contiguous()}, file, {"embedding": key, "format_version": "1"})


def read_profile(folder: Path, key: str) -> Tensor | None:
    """The profile in an adapter's folder: (k, parts, d); None where there is none, or one made by another embedding.

    Raises `AdapterError` for a damaged file.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            told, points = (
                (file.metadata() or {}).get("embedding"),
                file.get_tensor("points").float(),
            )
    except (SafetensorError, OSError) as error:
        raise AdapterError("cannot be read", where=str(folder / FILE), why=str(error)) from error
    if points.ndim != 3 or not len(points) or not bool(points.isfinite().all()):
        raise AdapterError(
            "no profile",
            where=str(folder / FILE),
            why="points (k, parts, d) of finite numbers are expected",
        )
    return points if told == key else None
