"""What is asked of the engine, and what comes back: the nouns that scheduler, runner and server share.

Request  --submit-->  Ticket        one sequence to continue, under some adapters
Event    <--on_event--              new text, as it appears; the last one says why it ended
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop: temperature 0 takes the likeliest.

    The penalties, `bias` and `logprobs` are those of OpenAI's API; `repetition_penalty` is CTRL's (arXiv 1909.05858).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on after the base's stop tokens, for measurements
    logit_bias: Mapping[int, float] = field(
        default_factory=dict
    )  # added to the logits of these tokens
    logprobs: int | None = (
        None  # how many likeliest tokens to report beside the chosen one; None: no logprobs
    )
    json_schema: Mapping[str, Any] | None = (
        None  # JSON schema that the answer must satisfy; {} means any JSON object
    )


@dataclass(frozen=True)
class AdapterWeight:
    """One adapter's share in a request: the content hash of an adapter on the shelf, and its weight."""

    adapter: str
    weight: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue. `parts` act together (a weighted sum); none: the base alone.

    `owner` keeps the cached pages of private adapters apart: equal prompts under different owners share none of them.
    `client` says whose turn it counts as where many wait; without one, each set of adapters has its turn.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapters: tuple[AdapterWeight, ...] = ()
    owner: str = ""
    client: str = ""
    stop_token_ids: frozenset[int] = frozenset()  # in addition to the base's own
    streams: bool = True  # False: the text comes with the last chunk


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability (nats), before temperature and filters, and the likeliest ones beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class OutputChunk:
    """What one step brought to one request: whole characters only, nothing of a stop string.

    The last event of a request has `finish`; after it none comes. `cached` counts the prompt's tokens that came out of
    the prefix cache.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0


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
    """A request that the engine has taken: what `cancel` wants."""

    number: int


OnOutput = Callable[[OutputChunk], None]  # called in the engine's thread; it must return at once


@dataclass(frozen=True)
class RegisteredAdapter:
    """A name on the shelf and what it points at. The adapter is its content: `hash`; names are labels.

    `state` says where its tensors are now: "disk", "host", "device", or "merged" into a second copy of the weights.
    """

    name: str
    hash: str
    folder: str
    method: str
    rank: int
    bytes: int
    state: str = "disk"
    owner: str | None = None  # None: public
    invocation: Sequence[int] = ()
    hits: int = 0
    tokens: int = 0
    load_seconds: float = 0.0
