"""A frozen base: its modules, its tokenizer, and the few ways in which the rest of afina calls it."""

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
from afina.models.fast_llama import LINEAR_TYPES
from afina.models.frozen import FrozenModel
from afina.models.nf4 import LayerQuantization
from afina.models.packed_attention import ATTENTION_NAME, AttentionMetadata

HEAD_CHUNK = 1024  # positions whose logits exist at a time where the output layer is adapted
PROBE = 6  # tokens of the self-check at loading
SCORE = "score"  # the module of a reward: as transformers calls it in a decoder that classifies


@dataclass
class CausalLM(FrozenModel):
    """A causal language model that never changes; adapters are attached to it and detached again.

    `flat` says whether the family takes a flat run of tokens through transformers' AttentionInterface; the
    others (state-space models, say) are run sequence by sequence, to the same result.
    """

    tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]
    supports_packing: bool = True
    quantization: str = "none"  # or "nf4": the blocks' layers in four bits a weight
    quantization_report: list[LayerQuantization] = field(
        default_factory=list
    )  # what that did to each layer

    def __post_init__(self) -> None:
        self.supports_packing = self.supports_packing and self._takes_flat_runs()
        self._check_causal()
        self._split_head = self._head_is_plain()

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return int(
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        )

    @property
    def num_layers(self) -> int:
        """How many blocks (layers of the decoder) there are."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the tokenizer's tokens, and what rows the model has beyond them."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def lm_head(self) -> nn.Module:
        """The output layer, from hidden states to logits."""
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
        """Gemma's soft cap on the logits, where there is one."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.no_grad()
    def add_tokens(self, names: Sequence[str]) -> dict[str, int]:
        """Make each name one token, and give the model a row for it where it has none; returns their numbers.

        New rows are the mean of the others, everywhere the same: what an adapter makes of them is in the adapter.
        Tokens that are there already keep their numbers and rows.
        """
        before = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        new = [name for name in names if name not in self.tokenizer.get_vocab()]
        if new and not isinstance(self.model.get_input_embeddings(), nn.Embedding):
            hint = "adapters with other new tokens need a base of their own"
            raise BaseError(
                f"no room for {', '.join(new)}: adapters are attached", where=self.name, hint=hint
            )
        self.tokenizer.add_tokens(
            [AddedToken(name, special=False, normalized=False) for name in names]
        )
        if len(self.tokenizer) > before and names:
            self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            for layer in (self.model.get_input_embeddings(), self.lm_head):
                layer.weight[before:] = layer.weight[:before].float().mean(0)  # type: ignore[index,operator]
                layer.requires_grad_(False)
        return {name: int(self.tokenizer.convert_tokens_to_ids(name)) for name in names}  # type: ignore[arg-type]

    def add_score_head(self) -> str:
        """Give the model a head from a hidden state to one number, all zero, where it has none; returns its name.

        Raises `BaseError` where the model does not give its last hidden states.
        """
        if not self._split_head:
            why = "its output layer is not the last thing that it does"
            raise BaseError("no hidden states to judge by", where=self.name, why=why)
        if not hasattr(self.model, SCORE):
            width = int(self.lm_head.weight.shape[1])  # type: ignore[index,arg-type]
            head = nn.Linear(width, 1, bias=False, device=self.device, dtype=torch.float32)
            self.model.add_module(SCORE, head.requires_grad_(False))
            nn.init.zeros_(head.weight)
        return SCORE

    # ---- forwards

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor,
        bounds: tuple[int, ...] | AttentionMetadata,
    ) -> Tensor:
        """Last hidden states (T, d) of a flat run: tokens (T), positions (T) within each sequence.

        A `Flat` in the place of the bounds says more about the run; only a base that is `flat` can read it.
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
        """Hidden states (T, layers, d) of a flat run, after these blocks; 0 stands for the embedding."""
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
        """Logits (n, V) in float32 of hidden states (n, d)."""
        logits = self.lm_head(hidden).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def all_logits(self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...]) -> Tensor:
        """All logits (T, V) in float32 of a flat run."""
        return (
            self.logits(self.hidden_states(tokens, positions, bounds))
            if self._split_head
            else self._whole(tokens, positions, bounds)
        )

    def next_token_logits(
        self,
        tokens: Tensor,  # (num_tokens,)
        positions: Tensor,  # (num_tokens,)
        bounds: tuple[int, ...] | AttentionMetadata,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Return float32 logits `(num_sequences, vocab_size)` after the last token of each sequence.

        Args:
            bounds: cumulative sequence lengths, or attention metadata with a KV cache.
            wanted: indices of the sequences to return; None returns all.
        """
        ends = bounds.cu_seqlens if isinstance(bounds, AttentionMetadata) else bounds
        chosen = range(len(ends) - 1) if wanted is None else wanted
        last = [ends[sequence + 1] - 1 for sequence in chosen]
        if not self._split_head:
            return self._whole(tokens, positions, bounds)[last]
        index = torch.tensor(last, dtype=torch.int64, device=tokens.device)
        hidden = self.hidden_states(tokens, positions, bounds)[index]
        with self.forward_context.use(self.forward_context.segments.select(last)):
            return self.logits(hidden)

    def _whole(
        self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...] | AttentionMetadata
    ) -> Tensor:
        """Return float32 logits `(num_tokens, vocab_size)` of the model's own forward pass."""
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
        """`run` of each sequence (1, n) alone, under its part of the table of segments; the outputs end to end."""
        segments, outputs = self.forward_context.segments, []
        for start, end in pairwise(bounds):
            with self.forward_context.use(segments.slice(start, end)):
                outputs.append(run(tokens[None, start:end])[0])
        return torch.cat(outputs)

    def loss(
        self, tokens: Tensor, positions: Tensor, bounds: tuple[int, ...], labels: Tensor
    ) -> Tensor:
        """Sum over labelled positions of the cross-entropy, in nats (float32); labels (T), -100 where there is none."""
        return self.token_losses(tokens, positions, bounds, labels).sum()

    def token_losses(
        self,
        tokens: Tensor,
        positions: Tensor,
        bounds: tuple[int, ...] | AttentionMetadata,
        labels: Tensor,
    ) -> Tensor:
        """The cross-entropy at each labelled position (n), in nats (float32), in their order.

        Positions without a label never reach the output layer, and the logits of the others exist a chunk at a time.
        """
        keep = (labels >= 0).nonzero()[:, 0]
        if self._split_head:
            return self.token_losses_from_hidden(
                self.hidden_states(tokens, positions, bounds)[keep], labels[keep], keep
            )
        assert not isinstance(bounds, AttentionMetadata)
        logits = self.all_logits(tokens, positions, bounds)[keep]
        return nn.functional.cross_entropy(logits, labels[keep], reduction="none")

    def token_losses_from_hidden(self, hidden: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """The cross-entropy (n), in nats (float32), of hidden states (n, d) that stand at `places` (n) of a flat run."""
        head = self.lm_head
        if type(head) in LINEAR_TYPES:
            assert isinstance(head, nn.Linear)
            return linear_cross_entropy(hidden, head.weight, head.bias, labels, self.softcap)
        segments, losses = self.forward_context.segments, []
        kept = places.tolist() if segments.spans else []
        for start in range(
            0, max(1, len(places)), HEAD_CHUNK
        ):  # an adapted head: recompute each chunk in the backward
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
        """Whether its logits are those of its output layer on its last hidden states, which a head of ours can read."""
        return self._split_head

    # ---- self-checks: a family that does things its own way must not be answered wrongly

    def _probe(self, starts: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        bounds = (0, *starts)
        lengths = [end - start for start, end in pairwise(bounds)]
        vocabulary = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        tokens = torch.arange(bounds[-1], device=self.device) * 7 % (vocabulary - 5) + 5
        return tokens, torch.cat([torch.arange(n, device=self.device) for n in lengths]), bounds

    @torch.no_grad()
    def _takes_flat_runs(self) -> bool:
        """Does a flat run of two sequences give what the family's own attention gives each alone? If not, that one stays on."""
        tokens, positions, bounds = self._probe((PROBE, PROBE + 4))
        try:
            together = self._whole(tokens, positions, bounds)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            together = None
        self._attend("eager")
        pieces = tokens.tensor_split(bounds[1:-1])
        alone = torch.cat(
            [self.model(input_ids=piece[None], use_cache=False).logits[0] for piece in pieces]
        ).float()
        if (
            together is None
            or not (together - alone).norm()
            <= (1e-4 if self.dtype == torch.float32 else 0.05) * alone.norm()
        ):
            return False  # attention sinks, masks of its own, states that run on, ...
        self._attend(ATTENTION_NAME)
        return True

    @torch.no_grad()
    def _check_causal(self) -> None:
        """Raise `BaseError` where a token changes what comes before it (BERT and its kind)."""
        tokens, positions, bounds = self._probe((PROBE,))
        other = torch.cat([tokens[:-1], tokens[:1]])
        first, second = (self._whole(run, positions, bounds)[:-1] for run in (tokens, other))
        if (first - second).norm() > 0.01 * first.norm():
            raise BaseError(
                "this model reads ahead; next-token learning needs a decoder", where=self.name
            )

    def _attend(self, implementation: str) -> None:
        """Choose the attention of all layers, also where a family from before the AttentionInterface would not."""
        self.model.set_attn_implementation(implementation)
        if self.model.config._attn_implementation != implementation:
            self.model.config._attn_implementation = (
                implementation  # its masks are made by this name
            )

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Are the model's logits those of its output layer on its last hidden states?"""
        if self.lm_head is None:
            raise BaseError("this model has no output layer over a vocabulary", where=self.name)
        tokens, positions, _ = self._probe((PROBE,))
        whole = self._whole(tokens, positions, (0, PROBE))
        try:
            split = self.logits(self.hidden_states(tokens, positions, (0, PROBE)))
        except (AttributeError, TypeError):  # base_model is no decoder that gives hidden states
            return False
        tolerance = (
            1e-5 if self.dtype == torch.float32 else 2e-2
        )  # a soft cap of 30 bends a logit of 1 by 4e-4 only
        return torch.allclose(whole, split, atol=tolerance, rtol=tolerance)
