"""Reference decoder: every step computes every sequence from its first token. No cache, no engine.

The engine's completions are compared with these.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import NO_ADAPTERS
from afina.engine.detokenizer import Detokenizer
from afina.engine.grammar import GrammarCompiler
from afina.engine.request import SamplingParams
from afina.engine.sampler import Sampler, sample
from afina.models.causal_lm import CausalLM


@torch.no_grad()
def reference_tokens(
    base: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    active: ActiveAdapters | None = None,
    stop_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the one that ended it; prompt i has seed + i."""
    stops = set() if sampling.ignore_eos else base.stop_token_ids | set(stop_token_ids)
    grammars = None if sampling.json_schema is None else GrammarCompiler(base.tokenizer)
    results: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        grammar = grammars.of(sampling.json_schema or {}, stops) if grammars else None
        own = replace(sampling, seed=sampling.seed + number)
        sampler = Sampler(own, prompt, base.vocab_size, grammar)
        text = Detokenizer(base.tokenizer, sampling.stop)
        is_invoked = active.is_invoked(prompt) if active is not None else ()
        limit = min(sampling.max_new_tokens, base.max_positions - len(prompt))
        new: list[int] = []
        while len(new) < limit:
            logits = _next_logits(base, [*prompt, *new], len(prompt), active, is_invoked)
            new.append(sample(logits, [sampler])[0].token)
            if sampling.stop:
                text.add(new[-1])
            if new[-1] in stops or text.stopped or sampler.is_finished:
                break
        results.append(new)
    return results


def _next_logits(
    base: CausalLM,
    tokens: list[int],
    prompt_length: int,
    active: ActiveAdapters | None,
    is_invoked: tuple[bool, ...],
) -> torch.Tensor:
    """Return logits `(1, vocab_size)`; only the prompt invokes an activated adapter."""
    bounds = tuple(accumulate([len(tokens)], initial=0))
    hidden = torch.tensor([*tokens[:prompt_length], *[-1] * (len(tokens) - prompt_length)])
    segments = NO_ADAPTERS if active is None else active.segments(hidden, bounds)
    with base.forward_context.use(segments):
        return base.next_token_logits(torch.tensor(tokens), torch.arange(len(tokens)), bounds)
