"""What a policy is compared with, explicit: one object, three modes, and a rule that chooses.

    base          the adapter off: right where the adapter begins at zero
    adapter       a frozen copy of the adapter that the run began with: right where an adapter is gone on with
    precomputed   the log-probabilities of one of these two, worked out before the first step and kept with the run

The wrong one is silent: an adapter that goes on from another and is compared with the bare base begins with a margin that
nobody trained. What could be either is an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.base.model import Base
from afina.config import PolicyOptions, PreferenceOptions
from afina.data.batches import FlatBatch, flatten, pack
from afina.data.template import Example
from afina.disk import new_file, write_json
from afina.errors import SettingsError, TrainingError
from afina.objective.reading import Reading
from afina.route.invocation import Route
from afina.segments import BASE, Segments

STORY, FILE = "reference.json", "reference.safetensors"


def table_of(batch: FlatBatch, route: Route | None) -> Segments:
    """Who acts on a batch; nobody without a route."""
    return BASE if route is None else route.segments(batch.tokens, batch.bounds)


def answer_logps(
    base: Base, batch: FlatBatch, route: Route | None, reading: Reading | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each sequence's labelled tokens in nats, float32 (sequences), and how many these are (sequences).

    A `reading` of the batch shares with the others that are made of it.
    """
    table = table_of(batch, route)
    lean = (reading or Reading(base, batch, table)).lean(table)
    with base.board.route(lean.table):
        losses = base.losses(lean.tokens, lean.positions, lean.flat, lean.labels)
    keep = (batch.labels >= 0).nonzero()[:, 0]
    ends = torch.tensor(batch.bounds[1:], device=keep.device)
    owner = torch.searchsorted(ends, keep, right=True)
    zeros = losses.new_zeros(len(ends))
    return zeros.index_add(0, owner, -losses), zeros.index_add(0, owner, torch.ones_like(losses))


@dataclass
class Reference:
    """Log-probabilities to compare with. `route` is the frozen adapter's, None for the base; `why` is the rule in words."""

    mode: str
    why: str
    route: Route | None = None
    adapter: str | None = None  # hash of the frozen adapter
    known: dict[str, float] = field(default_factory=dict)  # precomputed, by `key_of`

    @property
    def reads(self) -> bool:
        """Whether batches are read for it, and not remembered."""
        return not (self.mode == "precomputed" and self.known)

    def logps(
        self, base: Base, batch: FlatBatch, examples: Sequence[Example], reading: Reading | None = None
    ) -> Tensor:
        """Log-probabilities (sequences) of the answers in a batch of `examples`; no gradient."""
        if not self.reads:
            return torch.tensor([self.known[key_of(example)] for example in examples], device=batch.tokens.device)
        with torch.no_grad():
            return answer_logps(base, batch, self.route, reading)[0]

    def about(self) -> dict[str, Any]:
        """For reference.json and run.json."""
        of = "the base, adapter off" if self.route is None else "the adapter that the run began with, frozen"
        return {"mode": self.mode, "of": of, "adapter": self.adapter, "why": self.why}

    def settle(self, folder: Path, base: Base, examples: Sequence[Example], batch_tokens: int) -> None:
        """Write down what the reference is; for "precomputed", read what the run worked out, or work it out now.

        Raises `TrainingError` where the kept numbers are not of these rows, this base and this adapter.
        """
        write_json(folder / STORY, self.about())
        if self.mode != "precomputed":
            return
        of = hashlib.sha256("".join([base.hash, base.storage, str(base.dtype), self.adapter or ""]).encode()).hexdigest()
        if (folder / FILE).is_file():
            self.known = _read(folder / FILE, of)
        missing = list({key_of(e): e for e in examples if key_of(e) not in self.known}.values())
        for indices in pack([len(e.tokens) for e in missing], batch_tokens, range(len(missing))):
            batch = flatten([missing[i] for i in indices]).to(base.device)
            with torch.no_grad():
                found = answer_logps(base, batch, self.route)[0].tolist()
            self.known |= {key_of(missing[i]): value for i, value in zip(indices, found, strict=True)}
        if missing:
            _write(folder / FILE, of, self.known)


def key_of(example: Example) -> str:
    """What tells a sequence apart: its tokens and which of them are answers."""
    return hashlib.sha256(repr((example.tokens, example.labels)).encode()).hexdigest()[:32]


def _write(file: Path, of: str, known: dict[str, float]) -> None:
    keys = torch.tensor([list(bytes.fromhex(key)) for key in known], dtype=torch.uint8)
    tensors = {"keys": keys, "logps": torch.tensor(list(known.values()))}
    with new_file(file) as new:
        save_file(tensors, new, {"of": of})


def _read(file: Path, of: str) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        if (content.metadata() or {}).get("of") != of:
            hint = "start a new run with another --out"
            raise TrainingError("these reference log-probabilities are of another base or adapter", where=str(file), hint=hint)
    tensors = load_file(file)
    return {bytes(key.tolist()).hex(): value for key, value in zip(tensors["keys"], tensors["logps"].tolist(), strict=True)}


def choose_reference(
    options: PreferenceOptions | PolicyOptions, start: Route | None, adapter: str | None, dropout: float
) -> Reference:
    """The reference of a run by its rule; `start` is the route of the frozen adapter that it goes on from, if it does.

    Raises `SettingsError` where the set-up could mean two things.
    """
    told = options.reference
    if told == "base" and start is not None:
        why = "the policy begins with the adapter and its reference would begin without: a margin that nobody trained"
        hint = "leave `reference` out; or afina merge the adapter, and train on the merged model"
        raise SettingsError("the reference of a continued adapter is that adapter", where="options", why=why, hint=hint)
    if told == "adapter" and start is None:
        hint = "--options '{start: RUN}' goes on from an adapter"
        raise SettingsError("there is no adapter to be the reference", where="options", hint=hint)
    if dropout:
        why = "the policy would drop inputs and its reference would not: they would differ before anything is learned"
        raise SettingsError("a reference and dropout do not go together", where="dropout", why=why, hint="--dropout 0")
    why = "the run begins with an adapter" if start is not None else "the adapter begins at zero"
    mode = told if told == "precomputed" else "base" if start is None else "adapter"
    return Reference(mode, why, start, adapter)
