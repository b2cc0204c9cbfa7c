"""Routing profile of an adapter: a few means of the base's hidden states over its training prompts.

    prompt  --> hidden states after the embedding and the middle layer, means over tokens --> (2, d)
    prompts --> split at the median of their widest direction, repeatedly --> up to 16 groups: means

No text is stored, and each mean is over at least four prompts: the mean word vector of one prompt
would reveal its words.
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
LONGEST = 256  # tokens of a prompt that are embedded: its beginning and its end
BATCH_TOKENS = 2048


class Embedder(Protocol):
    """Vectors of prompts.

    Attributes:
        key: identifies the embedding; profiles with different keys cannot be compared.
    """

    key: str

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return float32 vectors `(n, parts, d)` of non-empty prompts of token ids."""


class PromptEmbedder:
    """Mean hidden states of the base, without adapters: `(n, 2, d)`."""

    def __init__(self, base: CausalLM) -> None:
        self._base, self._layers = base, (0, base.num_layers // 2)
        self.key = f"{base.hash or base.name} blocks {self._layers[0]}, {self._layers[1]}"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return float32 vectors `(n, 2, d)` of prompts of token ids."""
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
    """Tokens that a chat template writes around the last prompt; they are not part of it."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, renderer: Renderer) -> "ChatFrame":
        """Return the frame of the renderer's template."""
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
        """Return the last message of a prompt, or all of a prompt without this frame."""
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
    """Return the common prefix of two token lists."""
    return [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    ]


def build_profile(embedding: Embedder, questions: Sequence[Sequence[int]]) -> Tensor | None:
    """Return the profile `(k, parts, d)` of prompts of token ids; None for fewer than four."""
    prompts = [question for question in questions if question]
    prompts = prompts[:: max(1, len(prompts) // PROMPTS)][:PROMPTS]
    if len(prompts) < LEAST:
        return None
    vectors = embedding(prompts)
    spread = vectors - vectors.mean(0)
    scaled = (spread / spread.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-12)).flatten(
        1
    )
    return torch.stack(
        [vectors[rows].mean(0) for rows in _halve(scaled, torch.arange(len(prompts)), HALVINGS)]
    )


def _halve(points: Tensor, rows: Tensor, times: int) -> list[Tensor]:
    """Return the `rows` of points `(n, D)` in equal groups, split where they differ most."""
    if times == 0 or len(rows) < 2 * LEAST:
        return [rows]
    own = points[rows] - points[rows].mean(0)
    widest = torch.linalg.eigh(own @ own.T)[1][:, -1]  # positions along it
    order, middle = rows[widest.argsort(stable=True)], len(rows) // 2
    return _halve(points, order[:middle], times - 1) + _halve(points, order[middle:], times - 1)


def write_profile(folder: Path, profile: Tensor, key: str) -> None:
    """Write the profile to the adapter's `folder`."""
    with atomic_file(folder / FILE) as file:
        save_file({"points": profile.contiguous()}, file, {"embedding": key, "format_version": "1"})


def read_profile(folder: Path, key: str) -> Tensor | None:
    """Return the profile `(k, parts, d)` in an adapter's folder.

    Returns:
        None where there is no profile, or one of another embedding.

    Raises:
        AdapterError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            recorded = (file.metadata() or {}).get("embedding")
            points = file.get_tensor("points").float()
    except (SafetensorError, OSError) as error:
        raise AdapterError("cannot be read", where=str(folder / FILE), why=str(error)) from error
    if points.ndim != 3 or not len(points) or not bool(points.isfinite().all()):
        raise AdapterError(
            "no profile",
            where=str(folder / FILE),
            why="points (k, parts, d) of finite numbers are expected",
        )
    return points if recorded == key else None
