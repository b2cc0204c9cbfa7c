"""Rows of an encoder's requests, and the active adapters of a batch of them."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from afina.adapters.segments import Segment, Segments
from afina.engine.encoder_adapters import EncoderRecord, replaces_modules
from afina.engine.request import AdapterWeight
from afina.errors import AdapterError
from afina.models.classifier import Classifier


@dataclass(eq=False)
class EncoderRequest:
    """Rows of one request, and what they gave so far."""

    future: "Future[list[Tensor]]"
    view: Classifier
    adapters: tuple[AdapterWeight, ...]
    records: list[EncoderRecord]
    client: str
    request_id: str
    found: dict[int, Tensor] = field(default_factory=dict)
    num_rows: int = 0

    def take(self) -> bool:
        """Return whether it has neither ended nor been cancelled, and mark it as ending."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class EncoderRow:
    """One row of a request: tokens, and its number among the request's rows."""

    request: EncoderRequest
    number: int
    content: Any

    @property
    def length(self) -> int:
        """Length in tokens."""
        return len(self.content)


def check_finite(result: Tensor) -> None:
    """Raise `AdapterError` for a result that is not finite."""
    if not bool(result.isfinite().all()):
        why = "the adapter's weights are broken, or too large"
        raise AdapterError("the result is not finite", why=why)


def check_sum(request: EncoderRequest) -> None:
    """Raise `AdapterError` for a sum with an adapter that has modules of its own."""
    is_one = len(request.adapters) == 1 and request.adapters[0].weight == 1.0
    if not is_one and any(replaces_modules(record.config) for record in request.records):
        why = "its head replaces the base's, and has no sum with others"
        raise AdapterError("the adapter is active alone, with weight 1", why=why)


def adapters_of(row: EncoderRow) -> tuple[tuple[str, float], ...]:
    """Return the active adapters of a row with their weights."""
    return tuple((part.adapter, part.weight) for part in row.request.adapters)


def segments(batch: list[EncoderRow]) -> Segments:
    """Return the active adapters of a batch: on all rows where they are the same, else by row."""
    runs = [(key, len(list(rows))) for key, rows in groupby(batch, adapters_of)]
    if len({key for key, _ in runs}) == 1:
        return Segments(global_adapters=runs[0][0])
    spans, start = [], 0
    for key, length in runs:
        spans += [Segment(start, start + length, name, weight) for name, weight in key]
        start += length
    return Segments(spans=tuple(spans), unit="row")
