"""Requests to the engine and its outputs.

GenerationRequest  --add_request-->  RequestHandle    one sequence to continue, under some adapters
OutputChunk        <--on_output--                     new text; the last one has the finish reason
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping; temperature 0 takes the most probable token.

    The penalties, `logit_bias` and `logprobs` are those of OpenAI's API; `repetition_penalty` is
    CTRL's.

    References:
        Keskar et al. 2019, arXiv 1909.05858, section 4.1.

    Attributes:
        top_k: number of most probable tokens to sample from; 0: all.
        ignore_eos: continue after the base's stop tokens, for measurements.
        logit_bias: added to the logits of these tokens.
        logprobs: most probable tokens to report with the chosen one; None: no log-probabilities.
        json_schema: schema that the completion satisfies; `{}`: any JSON object.
        grammar: grammar of the completion in llguidance's form of Lark; replaces `json_schema`.
        min_tokens: stop tokens are not sampled before this many tokens.
        skip_special_tokens: whether special tokens are left out of the text.
        prompt_logprobs: most probable tokens to report with each token of the prompt; None: the
            prompt has no log-probabilities. Such a prompt is computed without the prefix cache.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    min_tokens: int = 0
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class AdapterWeight:
    """An adapter of a request: content hash of a registered one, and factor of its output."""

    adapter: str
    weight: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue.

    Attributes:
        adapters: active together, as a weighted sum; empty: the base alone.
        owner: equal prompts under private adapters share no cached blocks across owners.
        client: client of the fair queue; empty: one client for each set of adapters.
        stop_token_ids: tokens that end the completion in addition to the base's own.
        streams: whether text comes with each token; otherwise with the last chunk.
        cache_salt: cached blocks of different salts are never shared; empty: shared with all
            other requests without a salt.
        request_id: identifies the request in the log.
        is_embedding: return the mean of the prompt's last hidden states and generate nothing.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapters: tuple[AdapterWeight, ...] = ()
    owner: str = ""
    client: str = ""
    stop_token_ids: frozenset[int] = frozenset()
    streams: bool = True
    cache_salt: str = ""
    request_id: str = ""
    is_embedding: bool = False


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token in nats, before temperature and filters; and of the top ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class OutputChunk:
    """Output of one step for one request: complete characters, and nothing of a stop string.

    Attributes:
        finish_reason: set in the last chunk of a request only.
        error: what ended the request, for its sender: nothing of other requests.
        cause: the exception behind `error`, which may name files of this machine.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        embedding: vector of length 1, in the last chunk of a request for an embedding.
        prompt_logprobs: of each token of the prompt but the first, in the first chunk.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cause: Exception | None = None
    num_cached_tokens: int = 0
    embedding: tuple[float, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        text: decoded text without the stop token, stripped.
        token_ids: all generated tokens, with the one that ended it.
        ended_by_stop: whether the last token is a stop token; otherwise it reached a limit.
    """

    text: str
    token_ids: list[int]
    ended_by_stop: bool


@dataclass(frozen=True)
class RequestHandle:
    """A queued request, for `Engine.abort`."""

    number: int


OnOutput = Callable[[OutputChunk], None]  # called in the engine's thread; it must return at once


@dataclass(frozen=True)
class RegisteredAdapter:
    """A registered name and the adapter that it points at.

    Attributes:
        hash: identity of the adapter; names are labels.
        state: where its tensors are: "disk", "host", "device", or "merged" into a second copy of
            the weights.
        owner: user of a private adapter; None: public.
        hits: requests so far.
        tokens: generated tokens so far.
    """

    name: str
    hash: str
    folder: str
    method: str
    rank: int
    bytes: int
    state: str = "disk"
    owner: str | None = None
    invocation: Sequence[int] = ()
    hits: int = 0
    tokens: int = 0
    load_seconds: float = 0.0
