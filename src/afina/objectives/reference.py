"""Reference policy that DPO, KTO and the policy objectives compare with.

    base          the base without adapters: correct for an adapter that begins at zero
    adapter       a frozen copy of the initial adapter: correct for a run with init_adapter
    precomputed   log-probabilities of one of these two, computed before the first step

A wrong reference raises no error by itself: an adapter that continues another and is compared with
the base begins with a margin that no training produced. An ambiguous setting is therefore an error.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.segments import Segments
from afina.data.packing import PackedBatch, batches_by_length, pack_examples
from afina.data.renderer import Example
from afina.errors import SettingsError, TrainingError
from afina.io.atomic import atomic_file, write_json
from afina.models.causal_lm import CausalLM
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.settings import DPOSettings, KTOSettings, PolicySettings

REFERENCE_FILE, LOGPROBS_FILE = "reference.json", "reference.safetensors"


def segments_for(batch: PackedBatch, active: ActiveAdapters) -> Segments:
    """Return the adapter segments of a batch under `active`."""
    return active.segments(batch.token_ids, batch.cu_seqlens)


def sequence_logprobs(
    base: CausalLM,
    batch: PackedBatch,
    active: ActiveAdapters,
    reading: SharedPrefixBatch | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probability (nats, float32) and count of the targets of each sequence.

    Both are `(num_sequences,)`.

    Args:
        reading: the batch without its repeated prefixes, if the caller has it already.
    """
    table = segments_for(batch, active)
    inputs = (reading or SharedPrefixBatch(base, batch, table)).inputs_for(table)
    with base.forward_context.use(inputs.table):
        losses = base.token_losses(inputs.token_ids, inputs.positions, inputs.flat, inputs.labels)
    keep = (batch.labels >= 0).nonzero()[:, 0]
    ends = torch.tensor(batch.cu_seqlens[1:], device=keep.device)
    owner = torch.searchsorted(ends, keep, right=True)
    zeros = losses.new_zeros(len(ends))
    return zeros.index_add(0, owner, -losses), zeros.index_add(0, owner, torch.ones_like(losses))


@dataclass
class ReferencePolicy:
    """Reference policy: its mode, the reason for it, and its log-probabilities.

    Attributes:
        active: the frozen adapter, empty for the base.
        adapter: hash of the frozen adapter.
        cached_logprobs: precomputed log-probabilities in nats, by `example_key`.
    """

    mode: str
    why: str
    active: ActiveAdapters = BASE_ONLY
    adapter: str | None = None
    cached_logprobs: dict[str, float] = field(default_factory=dict)

    @property
    def needs_forward(self) -> bool:
        """Whether log-probabilities are computed, not read from the cache."""
        return not (self.mode == "precomputed" and self.cached_logprobs)

    def logps(
        self,
        base: CausalLM,
        batch: PackedBatch,
        examples: Sequence[Example],
        reading: SharedPrefixBatch | None = None,
    ) -> Tensor:
        """Return log-probabilities `(num_sequences,)` of completions, without gradient."""
        if not self.needs_forward:
            return torch.tensor(
                [self.cached_logprobs[example_key(example)] for example in examples],
                device=batch.token_ids.device,
            )
        with torch.no_grad():
            return sequence_logprobs(base, batch, self.active, reading)[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of reference.json and run.json."""
        of = (
            "the base, adapter off"
            if not self.active
            else "the adapter that the run began with, frozen"
        )
        return {"mode": self.mode, "of": of, "adapter": self.adapter, "why": self.why}

    def start_run(
        self, folder: Path, base: CausalLM, examples: Sequence[Example], batch_tokens: int
    ) -> None:
        """Write reference.json; for "precomputed", load the log-probabilities or compute them.

        Raises:
            TrainingError: the stored ones belong to another base or adapter.
        """
        write_json(folder / REFERENCE_FILE, self.to_dict())
        if self.mode != "precomputed":
            return
        of = _policy_hash(base, self.adapter)
        if (folder / LOGPROBS_FILE).is_file():
            self.cached_logprobs = _read(folder / LOGPROBS_FILE, of)
        keys = {example_key(e): e for e in examples}
        missing = {key: e for key, e in keys.items() if key not in self.cached_logprobs}
        names = list(missing)
        for indices, chosen in batches_by_length(list(missing.values()), batch_tokens):
            batch = pack_examples(chosen).to(base.device)
            with torch.no_grad():
                found = sequence_logprobs(base, batch, self.active)[0].tolist()
            self.cached_logprobs |= {names[i]: v for i, v in zip(indices, found, strict=True)}
        if missing:
            _write(folder / LOGPROBS_FILE, of, self.cached_logprobs)


def example_key(example: Example) -> str:
    """Return the cache key of an example: the hash of its token ids and loss mask."""
    return hashlib.sha256(repr((example.token_ids, example.loss_mask)).encode()).hexdigest()[:32]


def _policy_hash(base: CausalLM, adapter: str | None) -> str:
    """Return the identity of cached log-probabilities, with the word that 0.1 wrote for no NF4."""
    storage = "plain" if base.quantization == "none" else base.quantization
    content = "".join([base.hash, storage, str(base.dtype), adapter or ""])
    return hashlib.sha256(content.encode()).hexdigest()


def _write(file: Path, of: str, known: dict[str, float]) -> None:
    keys = torch.tensor([list(bytes.fromhex(key)) for key in known], dtype=torch.uint8)
    tensors = {"keys": keys, "logps": torch.tensor(list(known.values()))}
    with atomic_file(file) as new:
        save_file(tensors, new, {"of": of})


def _read(file: Path, of: str) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        if (content.metadata() or {}).get("of") != of:
            hint = "start a new run with another --output-dir"
            raise TrainingError(
                "these reference log-probabilities are of another base or adapter",
                where=str(file),
                hint=hint,
            )
    tensors = load_file(file)
    return {
        bytes(key.tolist()).hex(): value
        for key, value in zip(tensors["keys"], tensors["logps"].tolist(), strict=True)
    }


def select_reference(
    options: DPOSettings | KTOSettings | PolicySettings,
    start: ActiveAdapters,
    adapter: str | None,
    dropout: float,
) -> ReferencePolicy:
    """Return the reference policy of a run.

    Args:
        start: the frozen initial adapter, empty if the run begins at zero.
        adapter: hash of the initial adapter.
        dropout: dropout of the adapter.

    Raises:
        SettingsError: the settings are ambiguous, or the adapter has dropout.
    """
    mode = options.reference
    if mode == "base" and start:
        why = "the policy begins with the adapter, its reference would not: an untrained margin"
        hint = "omit `reference`; or afina merge the adapter, and train on the merged model"
        raise SettingsError(
            "the reference of a continued adapter is that adapter",
            where="reference",
            why=why,
            hint=hint,
        )
    if mode == "adapter" and not start:
        hint = "--init-adapter RUN continues from an adapter"
        raise SettingsError("there is no adapter to be the reference", where="reference", hint=hint)
    if dropout:
        why = "dropout applies to the policy only: it would differ from its reference at step 0"
        raise SettingsError(
            "a reference and dropout do not go together",
            where="dropout",
            why=why,
            hint="--dropout 0",
        )
    why = "the run begins with an adapter" if start else "the adapter begins at zero"
    mode = mode if mode == "precomputed" else "adapter" if start else "base"
    return ReferencePolicy(mode, why, start, adapter)
