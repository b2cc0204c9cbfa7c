"""Merged mode: an adapter with nearly all tokens is merged into a second copy of the weights.

    others rare     base + hot adapter in one matrix: no layer adds anything    (dLoRA, OSDI 2024)
    others come     the base's own matrices and the adapters of all requests

The base's own weights do not change, so that unmerging is exact. Steps of both kinds are timed to
decide whether merging is faster, and two thresholds keep it from alternating.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from afina.adapters.segments import Segments
from afina.adapters.serving_layers import LoRAView, MergedLinear
from afina.engine.loaded_adapter import get_or_insert_wrapper
from afina.engine.memory import MemoryManager
from afina.engine.sequence import AdapterSpan, ScheduledChunk
from afina.models.causal_lm import CausalLM

LOG = logging.getLogger("afina.engine")
MERGE_RATIO, UNMERGE_RATIO = 0.8, 0.5  # ratio of recent tokens that are one adapter's
GAIN = 1.01  # speedup that merged steps must have to stay
RECENT = 0.98  # decay of a step's weight with each later one
SLICE = 0.005  # seconds of merging between two steps
TRIALS = 8  # steps of each kind that are timed before they are compared


@dataclass
class StepTimer:
    """Moving mean of the seconds of a step, by its number of tokens in powers of two."""

    seconds: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def note(self, tokens: int, seconds: float) -> None:
        """A step was taken."""
        size = tokens.bit_length()
        count = self.counts[size] = self.counts.get(size, 0) + 1
        before = self.seconds.get(size, seconds)
        self.seconds[size] = before + (seconds - before) / min(count, 50)


class HotAdapterMerger:
    """Merges the hot adapter, a few layers per step, and selects the steps that run merged."""

    def __init__(self, base: CausalLM, memory: MemoryManager, allowed: int) -> None:
        self.base, self.memory, self.allowed = base, memory, allowed
        self.hot_adapter: str | None = None  # the content hash that is merged, or is being merged
        self.ready = False
        self.steps = 0
        self._shares: dict[str, float] = {}
        self._total = 0.0
        self._work: Iterator[None] = iter(())
        self._clocks = {True: StepTimer(), False: StepTimer()}
        self._rejected: set[str] = set()  # where merging did not pay, or does not fit

    # ---- the next step

    def segments(self, chunks: Sequence[ScheduledChunk]) -> Segments | None:
        """Return the segments of a merged step; None with other adapters, or for a trial."""
        if not self.ready or self.hot_adapter is None:
            return None
        alone = all(_alone(s.adapter_spans) == self.hot_adapter for s, _ in chunks)
        return (
            Segments.on_all_tokens(_label(self.hot_adapter))
            if alone and not self._trial(chunks)
            else None
        )

    def _trial(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Return whether this step runs unmerged, for comparison."""
        size = sum(count for _, count in chunks).bit_length()
        merged, plain = (self._clocks[way].counts.get(size, 0) for way in (True, False))
        return plain < TRIALS <= merged

    def should_defer(self, spans: Sequence[AdapterSpan]) -> bool:
        """Return whether a request should wait, so that steps stay merged."""
        return self.ready and _alone(spans) != self.hot_adapter

    # ---- statistics

    def record_step(self, chunks: Sequence[ScheduledChunk], seconds: float, merged: bool) -> None:
        """Count the adapters of a step and its seconds, and decide on merging."""
        self.steps += merged
        tokens = sum(count for _, count in chunks)
        if self.hot_adapter is not None and (
            merged or all(_alone(s.adapter_spans) == self.hot_adapter for s, _ in chunks)
        ):
            self._clocks[merged].note(tokens, seconds)
        for name in self._shares:
            self._shares[name] *= RECENT
        self._total = self._total * RECENT + len(chunks)
        for sequence, _ in chunks:
            if (alone := _alone(sequence.adapter_spans)) is not None:
                self._shares[alone] = self._shares.get(alone, 0.0) + 1.0
        self._decide()

    def _decide(self) -> None:
        if self.hot_adapter is not None:
            until = time.perf_counter() + SLICE
            try:
                while not self.ready and time.perf_counter() < until:
                    next(self._work, None)
            except Exception:  # out of memory: requests continue on the base's own weights
                LOG.exception("an adapter could not be merged")
                self._rejected.add(self.hot_adapter)
                self.unmerge()
                return
            if self._share(self.hot_adapter) < UNMERGE_RATIO or not self._pays():
                self.unmerge()
            return
        if self._total < 0.5 / (1 - RECENT):  # too few steps
            return
        name = max(self._shares, key=lambda n: self._shares[n], default=None)
        if (
            name is not None
            and self._share(name) >= MERGE_RATIO
            and name not in self._rejected
            and name in self.memory.residents
        ):
            self._begin(name)

    def _share(self, name: str) -> float:
        return self._shares.get(name, 0.0) / max(self._total, 1e-9)

    def _pays(self) -> bool:
        """Return whether merged steps are faster; True until both kinds have been timed."""
        merged, plain = self._clocks[True], self._clocks[False]
        sizes = [
            s for s, n in merged.counts.items() if n >= TRIALS and plain.counts.get(s, 0) >= TRIALS
        ]
        if not sizes or not self.ready:
            return True
        size = max(sizes, key=lambda s: merged.counts[s])
        pays = plain.seconds[size] > GAIN * merged.seconds[size]
        if not pays and self.hot_adapter is not None:
            self._rejected.add(self.hot_adapter)
        return pays

    # ---- the second copy

    def _begin(self, name: str) -> None:
        resident = self.memory.residents[name]
        size = (
            sum(layer.inputs * layer.outputs for layer in resident.layout.lora_offsets or ())
            * self.base.dtype.itemsize
        )
        if resident.layout.lora_offsets is None or size > self.allowed:
            self._rejected.add(name)
            return
        self.hot_adapter, self.ready = name, False
        self._clocks = {True: StepTimer(), False: StepTimer()}
        resident.ref_count += 1  # not evicted while it is being merged
        resident.activate(self.base)
        self._work = self._merge(name)

    @torch.no_grad()
    def _merge(self, name: str) -> Iterator[None]:
        resident = self.memory.residents[name]
        for layer in resident.layout.lora_offsets or ():
            adapted = get_or_insert_wrapper(self.base, layer.path)
            view = adapted.serving_layers[name]
            assert isinstance(view, LoRAView)
            adapted.serving_layers[_label(name)] = MergedLinear.of(adapted.layer, view)
            yield
        self.ready = True
        self.memory.registry.locations[name] = "merged"

    def unmerge(self) -> None:
        """Return to the base's own weights and free the second copy."""
        if self.hot_adapter is None:
            return
        name, self.hot_adapter, self.ready = self.hot_adapter, None, False
        resident = self.memory.residents[name]
        for layer in resident.layout.lora_offsets or ():
            get_or_insert_wrapper(self.base, layer.path).serving_layers.pop(_label(name), None)
        self.memory.registry.locations[name] = (
            "device" if self.memory.pool.memory.is_cuda else "host"
        )
        self.memory.release(name)


def _alone(spans: Sequence[AdapterSpan]) -> str | None:
    """Return the adapter that is active alone, on all tokens, with weight 1; else None."""
    return spans[0][0] if len(spans) == 1 and spans[0][1:] == (1.0, 0) else None


def _label(name: str) -> str:
    return name + "+W"
