"""The frozen causal language model: tokenizer, hidden states, logits and losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AddedToken, PreTrainedTokenizerBase

from afina.errors import BaseError
from afina.kernels.cross_entropy import linear_cross_entropy
from afina.models.fast_llama import LINEAR_TYPES, FastLinear
from afina.models.frozen import FrozenModel
from afina.models.nf4 import LayerQuantization
from afina.models.packed_attention import ATTENTION_NAME, AttentionMetadata

HEAD_CHUNK = 1024  # positions whose logits are allocated at a time with an adapted output layer
PROBE = 6  # tokens of the self-checks at loading
SCORE = "score"  # a reward model's head, named as in transformers' decoders that classify


@dataclass
class CausalLM(FrozenModel):
    """A frozen causal language model.

    Attributes:
        tokenizer: Its tokenizer.
        supports_packing: Whether it takes a packed batch through transformers' AttentionInterface;
            others (such as state-space models) run sequence by sequence, with the same result.
        quantization: "none", or "nf4": the modules in its layers in 4 bits per weight.
        quantization_report: The error of each quantized module.
    """

    tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]
    supports_packing: bool = True
    quantization: str = "none"
    quantization_report: list[LayerQuantization] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.supports_packing = self.supports_packing and self._takes_packed_batch()
        self._check_causal()
        self._split_head = self._has_plain_head()

    @property
    def max_positions(self) -> int:
        """Longest supported sequence, in tokens."""
        return int(
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the tokenizer's tokens and the model's unused rows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def lm_head(self) -> nn.Module:
        """Output layer, from hidden states to logits."""
        return self.model.get_output_embeddings()

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End-of-sequence tokens of the tokenizer and of the model's generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        found = configured if isinstance(configured, list) else [configured]
        every = [*found, self.tokenizer.eos_token_id]
        return frozenset(token for token in every if token is not None)

    @property
    def softcap(self) -> float | None:
        """Gemma's soft cap of the logits, or None."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.no_grad()
    def add_tokens(self, names: Sequence[str]) -> dict[str, int]:
        """Add each name as one token, with a row in the model where it has none.

        New rows are the mean of the others, for every adapter: trained values are in the adapter.
        Existing tokens keep their ids and rows.

        Returns:
            The token ids by name.

        Raises:
            BaseError: new tokens are needed while adapters are attached to the embedding.
        """
        before = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        new = [name for name in names if name not in self.tokenizer.get_vocab()]
        if new and not isinstance(self.model.get_input_embeddings(), nn.Embedding):
            hint = "load another base for adapters with other new tokens"
            what = f"{', '.join(new)} cannot be added: adapters are attached to the embedding"
            raise BaseError(what, where=self.name, hint=hint)
        self.tokenizer.add_tokens(
            [AddedToken(name, special=False, normalized=False) for name in names]
        )
        if len(self.tokenizer) > before and names:
            self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            layers: list[Any] = [self.model.get_input_embeddings(), self.lm_head]
            for layer in layers:
                layer.weight[before:] = layer.weight[:before].float().mean(0)
                layer.requires_grad_(False)
        id_of: Any = self.tokenizer.convert_tokens_to_ids
        return {name: int(id_of(name)) for name in names}

    def add_score_head(self) -> str:
        """Add a head from a hidden state to a scalar, initialized to zero, where there is none.

        Returns:
            The name of its module.

        Raises:
            BaseError: the last hidden states are not available.
        """
        if not self._split_head:
            why = "its logits are not those of its output layer on its last hidden states"
            raise BaseError("this model cannot have a score head", where=self.name, why=why)
        if not hasattr(self.model, SCORE):
            width = int(self.lm_head.weight.shape[1])  # type: ignore[index,arg-type]
            head = nn.Linear(width, 1, bias=False, device=self.device, dtype=torch.float32)
            self.model.add_module(SCORE, head.requires_grad_(False))
            nn.init.zeros_(head.weight)
        return SCORE

    # ---- forward passes

    def hidden_states(
        self,
        tokens: Tensor,  # (num_tokens,)
        positions: Tensor,  # (num_tokens,), within each sequence
        bounds: tuple[int, ...] | AttentionMetadata,
    ) -> Tensor:
        """Return the last hidden states `(num_tokens, hidden_size)` of a packed batch.

        `bounds` are cumulative sequence lengths, or attention metadata if `supports_packing`.
        """
        decoder = self.model.base_model
        flat = bounds if isinstance(bounds, AttentionMetadata) else AttentionMetadata(bounds)
        if self.supports_packing:
            return decoder(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, flat=flat
            ).last_hidden_state[0]
        return self._one_by_one(
            lambda ids: decoder(input_ids=ids, use_cache=False).last_hidden_state,
            tokens,
            flat.cu_seqlens,
        )

    def layer_hidden_states(
        self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...], layers: Sequence[int]
    ) -> Tensor:
        """Return hidden states `(num_tokens, len(layers), hidden_size)`; layer 0: embedding."""
        decoder = self.model.base_model

        def run(ids: Tensor, **flat: Any) -> Tensor:
            states = decoder(
                input_ids=ids, use_cache=False, output_hidden_states=True, **flat
            ).hidden_states
            return torch.stack([states[layer] for layer in layers], -2)

        if self.supports_packing:
            return run(tokens[None], position_ids=positions[None], flat=AttentionMetadata(bounds))[
                0
            ]
        return self._one_by_one(run, tokens, bounds)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `(n, vocab_size)` of hidden states `(n, hidden_size)`.

        Without gradients a 16-bit output layer, adapted or not, is summed in float32: rounded to
        16 bits, many of the largest logits are equal.
        """
        head = self.lm_head
        is_fast = isinstance(getattr(head, "base", head), FastLinear)
        if is_fast and hidden.element_size() == 2 and not torch.is_grad_enabled():
            hidden = hidden.float()
        logits = head(hidden).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def all_logits(self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...]) -> Tensor:
        """Return all float32 logits `(num_tokens, vocab_size)` of a packed batch."""
        return (
            self.logits(self.hidden_states(tokens, positions, bounds))
            if self._split_head
            else self._complete_forward(tokens, positions, bounds)
        )

    def next_token_logits(
        self,
        tokens: Tensor,  # (num_tokens,)
        positions: Tensor,  # (num_tokens,)
        bounds: tuple[int, ...] | AttentionMetadata,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Return float32 logits `(num_sequences, vocab_size)` after the last token of each.

        Args:
            bounds: cumulative sequence lengths, or attention metadata with a KV cache.
            wanted: indices of the sequences to return; None returns all.
        """
        ends = bounds.cu_seqlens if isinstance(bounds, AttentionMetadata) else bounds
        chosen = range(len(ends) - 1) if wanted is None else wanted
        last = [ends[sequence + 1] - 1 for sequence in chosen]
        return self.logits_reader(tokens, positions, bounds)(last)

    def logits_reader(
        self,
        tokens: Tensor,  # (num_tokens,)
        positions: Tensor,  # (num_tokens,)
        bounds: tuple[int, ...] | AttentionMetadata,
    ) -> Callable[[Sequence[int]], Tensor]:
        """Run one forward pass; return what computes the logits after ascending token indices.

        The logits are float32 `(num_indices, vocab_size)`; all at once may not fit into memory.
        """
        if not self._split_head:
            logits = self._complete_forward(tokens, positions, bounds)
            return lambda rows: logits[list(rows)]
        hidden = self.hidden_states(tokens, positions, bounds)
        segments = self.forward_context.segments

        def read(rows: Sequence[int]) -> Tensor:
            index = torch.tensor(list(rows), dtype=torch.int64, device=hidden.device)
            with self.forward_context.use(segments.select(rows)):
                return self.logits(hidden[index])

        return read

    def _complete_forward(
        self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...] | AttentionMetadata
    ) -> Tensor:
        """Return float32 logits `(num_tokens, vocab_size)` of the model's forward pass."""
        flat = bounds if isinstance(bounds, AttentionMetadata) else AttentionMetadata(bounds)
        if self.supports_packing:
            output = self.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, flat=flat
            )
            return output.logits[0].float()
        return self._one_by_one(
            lambda ids: self.model(input_ids=ids, use_cache=False).logits, tokens, flat.cu_seqlens
        ).float()

    def _one_by_one(
        self, run: Callable[[Tensor], Tensor], tokens: Tensor, bounds: tuple[int, ...]
    ) -> Tensor:
        """Return the concatenated outputs of `run` for each sequence `(1, n)`."""
        segments, outputs = self.forward_context.segments, []
        for start, end in pairwise(bounds):
            with self.forward_context.use(segments.slice(start, end)):
                outputs.append(run(tokens[None, start:end])[0])
        return torch.cat(outputs)

    def loss(
        self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...], labels: Tensor
    ) -> Tensor:
        """Return the summed cross-entropy of target tokens, in nats (float32).

        Args:
            tokens: `(num_tokens,)`.
            positions: `(num_tokens,)`, within each sequence.
            bounds: Cumulative sequence lengths.
            labels: `(num_tokens,)`, -100 where there is no target.
        """
        return self.token_losses(tokens, positions, bounds, labels).sum()

    def token_losses(
        self,
        tokens: Tensor,
        positions: Tensor,
        bounds: tuple[int, ...] | AttentionMetadata,
        labels: Tensor,
    ) -> Tensor:
        """Return the cross-entropy of each target token `(num_targets,)`, in nats (float32).

        Other positions do not reach the output layer; logits are allocated one chunk at a time.
        """
        keep = (labels >= 0).nonzero()[:, 0]
        if self._split_head:
            return self.token_losses_from_hidden(
                self.hidden_states(tokens, positions, bounds)[keep], labels[keep], keep
            )
        assert not isinstance(bounds, AttentionMetadata)
        logits = self.all_logits(tokens, positions, bounds)[keep]
        return nn.functional.cross_entropy(logits, labels[keep], reduction="none")

    def token_losses_from_hidden(self, hidden: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the cross-entropy `(n,)`, in nats (float32), of hidden states `(n, hidden_size)`.

        `indices` `(n,)` are their indices in the packed batch.
        """
        head = self.lm_head
        if type(head) in LINEAR_TYPES:
            assert isinstance(head, nn.Linear)
            return linear_cross_entropy(hidden, head.weight, head.bias, labels, self.softcap)
        segments, losses = self.forward_context.segments, []
        kept = indices.tolist() if segments.spans else []
        for start in range(0, max(1, len(indices)), HEAD_CHUNK):  # adapted head: recompute chunks
            chunk = slice(start, start + HEAD_CHUNK)
            with self.forward_context.use(segments.select(kept[chunk])):
                losses.append(
                    checkpoint(
                        lambda h, t: nn.functional.cross_entropy(
                            self.logits(h), t, reduction="none"
                        ),
                        hidden[chunk],
                        labels[chunk],
                        use_reentrant=False,
                        context_fn=self.forward_context.checkpoint_contexts(),
                    )
                )
        return torch.cat(losses)

    @property
    def has_hidden_states(self) -> bool:
        """Whether the logits are those of the output layer on the last hidden states."""
        return self._split_head

    # ---- self-checks: a family with other arithmetic must not give wrong results

    def _probe(self, starts: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        bounds = (0, *starts)
        lengths = [end - start for start, end in pairwise(bounds)]
        vocabulary = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        tokens = torch.arange(bounds[-1], device=self.device) * 7 % (vocabulary - 5) + 5
        return tokens, torch.cat([torch.arange(n, device=self.device) for n in lengths]), bounds

    @torch.no_grad()
    def _takes_packed_batch(self) -> bool:
        """Return whether a packed batch of two sequences has the outputs of each alone.

        If not, the family's own attention stays in use.
        """
        tokens, positions, bounds = self._probe((PROBE, PROBE + 4))
        try:
            packed = self._complete_forward(tokens, positions, bounds)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            packed = None
        self._attend("eager")
        pieces = tokens.tensor_split(bounds[1:-1])
        alone = torch.cat(
            [self.model(input_ids=piece[None], use_cache=False).logits[0] for piece in pieces]
        ).float()
        if (
            packed is None
            or not (packed - alone).norm()
            <= (1e-4 if self.dtype == torch.float32 else 0.05) * alone.norm()
        ):
            return False  # attention sinks, other masks, recurrent states, ...
        self._attend(ATTENTION_NAME)
        return True

    @torch.no_grad()
    def _check_causal(self) -> None:
        """Raise `BaseError` where a token changes outputs before it, as in BERT."""
        tokens, positions, bounds = self._probe((PROBE,))
        other = torch.cat([tokens[:-1], tokens[:1]])
        first, second = (
            self._complete_forward(run, positions, bounds)[:-1] for run in (tokens, other)
        )
        if (first - second).norm() > 0.01 * first.norm():
            raise BaseError(
                "this model is not causal, and next-token prediction needs a decoder",
                where=self.name,
            )

    def _attend(self, implementation: str) -> None:
        """Set the attention of all layers, also in families from before the AttentionInterface."""
        self.model.set_attn_implementation(implementation)
        if self.model.config._attn_implementation != implementation:
            self.model.config._attn_implementation = implementation  # selects the mask

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Return whether the logits are those of the output layer on the last hidden states."""
        if self.lm_head is None:
            raise BaseError("this model has no output layer over a vocabulary", where=self.name)
        tokens, positions, _ = self._probe((PROBE,))
        complete = self._complete_forward(tokens, positions, (0, PROBE))
        try:
            split = self.logits(self.hidden_states(tokens, positions, (0, PROBE)))
        except (AttributeError, TypeError):  # base_model does not return hidden states
            return False
        # a soft cap of 30 changes a logit of 1 by only 4e-4
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        return torch.allclose(complete, split, atol=tolerance, rtol=tolerance)
