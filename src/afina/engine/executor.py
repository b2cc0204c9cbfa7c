"""Execution of a step, in which an error ends only the request that caused it.

    chunks --> one forward pass --error--> halves --> ... --> the failing request alone
           --> logits --> one token or one error per sequence

A forward pass changes no sequence, and writes keys and values only into the blocks of its own
chunks, so that it can be repeated with fewer of them.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from afina.engine.hot_merge import HotAdapterMerger
from afina.engine.model_runner import ModelRunner
from afina.engine.request import Logprob
from afina.engine.sampler import sample
from afina.engine.sequence import ScheduledChunk, SequenceState
from afina.errors import BaseError

Output = (
    Logprob | Tensor | Exception
)  # a token, an embedding `(hidden_size,)`, or why there is none
Computed = TypeVar("Computed")


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        outputs: of each sequence that has one; the others have computed a part of their prompt.
        failed_forward: `seq_id` of the sequences whose chunk could not be computed.
        is_merged: whether the hot adapter's merged weights were used.
    """

    outputs: Sequence[tuple[SequenceState, Output]]
    failed_forward: Collection[int]
    is_merged: bool


class StepExecutor:
    """Forward pass and sampling of scheduled chunks. Only the engine's thread calls."""

    def __init__(self, runner: ModelRunner, merging: HotAdapterMerger) -> None:
        self._runner, self._merging = runner, merging
        self._suspects: set[str] = set()  # adapters whose request failed alone in its last pass

    def run(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """Compute the chunks, and sample where a sequence is complete.

        Raises:
            BaseError: the device computes nothing any more.
        """
        errors: list[tuple[SequenceState, Output]] = []
        reading = [chunk for chunk in chunks if chunk[0].request.is_embedding]
        writing = [chunk for chunk in chunks if not chunk[0].request.is_embedding]
        merged = self._merging.segments(writing) if writing else None

        def write(part: Sequence[ScheduledChunk]) -> tuple[list[SequenceState], Tensor]:
            return self._runner.run(part, merged)

        done = list(self._in_groups(writing, write, errors))
        sums = [
            s for part in self._in_groups(reading, self._runner.hidden_sums, errors) for s in part
        ]
        outputs: list[tuple[SequenceState, Output]] = []
        if sequences := [sequence for complete, _ in done for sequence in complete]:
            logits = done[0][1] if len(done) == 1 else torch.cat([part for _, part in done])
            sampled = sample(logits, [sequence.sampler for sequence in sequences])
            outputs += zip(sequences, sampled, strict=True)
        outputs += [(s, mean) for s, mean in map(_add_hidden, sums) if mean is not None]
        failed = {sequence.seq_id for sequence, _ in errors}
        return StepResult([*outputs, *errors], failed, merged is not None)

    def forget(self, adapter: str) -> None:
        """Note that no request can name this adapter any more."""
        self._suspects.discard(adapter)

    def _in_groups(
        self,
        chunks: Sequence[ScheduledChunk],
        run: Callable[[Sequence[ScheduledChunk]], Computed],
        errors: list[tuple[SequenceState, Output]],
    ) -> Iterable[Computed]:
        """Yield what `run` returns of each group of chunks; add those of sequences to `errors`.

        There is one group, but for adapters whose last forward pass failed: each of them has its
        own, so that requests of others are computed once.
        """
        groups: dict[str, list[ScheduledChunk]] = {}
        for chunk in chunks:
            names = {name for name, _, _ in chunk[0].adapter_spans} & self._suspects
            groups.setdefault(min(names, default=""), []).append(chunk)
        todo = list(groups.values())
        while todo:
            part = todo.pop()
            try:
                computed = run(part)
            except Exception as error:
                if len(part) > 1:
                    part = sorted(part, key=lambda chunk: chunk[0].adapter_spans)
                    todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                    continue
                self._check_device()
                self._suspects |= {name for name, _, _ in part[0][0].adapter_spans}
                errors.append((part[0][0], error))
                continue
            self._suspects -= {name for s, _ in part for name, _, _ in s.adapter_spans}
            yield computed

    def _check_device(self) -> None:
        """Raise `BaseError` where even a sum of two numbers fails: no request can be answered."""
        device = self._runner.base.device
        try:
            torch.ones(2, device=device).sum().item()
        except Exception as error:
            raise BaseError("the device does not compute any more", why=str(error)) from error


def _add_hidden(part: tuple[ScheduledChunk, Tensor]) -> tuple[SequenceState, Tensor | None]:
    """Add a chunk's sum to its sequence; return the embedding once the prompt is complete."""
    (sequence, count), total = part
    before = sequence.hidden_sum if sequence.num_computed_tokens else None
    sequence.hidden_sum = total if before is None else before + total
    if sequence.num_uncomputed_tokens > count:
        return sequence, None
    mean = sequence.hidden_sum / len(sequence.token_ids)
    return sequence, torch.nn.functional.normalize(mean, dim=-1)
