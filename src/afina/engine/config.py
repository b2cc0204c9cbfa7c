"""Limits of an engine, and the pool size that a list of prompts needs."""

from collections.abc import Iterable
from dataclasses import dataclass

from afina.engine.kv_cache import KVCache
from afina.models.causal_lm import CausalLM

MAX_NUM_SEQS = 64  # sequences of one step; more gain no tokens per second on 2 to 16 CPU cores
MIN_BLOCKS = 4  # smallest pool, in blocks


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        pool_bytes: size of the pool of keys, values and adapters.
        max_num_batched_tokens: tokens of a step while sequences decode; four times as many else.
        max_num_seqs: sequences of a step.
        max_num_waiting: queued requests of one client, beyond which its requests are rejected.
        max_total_waiting: queued requests of all clients together, likewise.
        host_cache_bytes: adapters kept in host memory, for a pool on a GPU.
        merged_weights_bytes: limit of a second copy of the weights, with a hot adapter merged in;
            0 never merges.
        require_audit: serve only adapters with an audit report, and hash an adapter's tensors
            again each time they are read.
        reserved_names: names that no adapter may have, such as the base's.
    """

    pool_bytes: int = 1 << 30
    max_num_batched_tokens: int = 512
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_waiting: int = 1024
    max_total_waiting: int = 1 << 20
    host_cache_bytes: int = 0
    merged_weights_bytes: int = 0
    require_audit: bool = False
    reserved_names: tuple[str, ...] = ()


def block_bytes(base: CausalLM, cache: KVCache) -> int:
    """Return the size of a block in bytes."""
    return sum(layer.numel_per_block for layer in cache.layers.values()) * base.dtype.itemsize


def blocks_for_lengths(lengths: Iterable[int], cache: KVCache) -> int:
    """Return the blocks that sequences of these lengths (in tokens) need in one step.

    Beyond `MAX_NUM_SEQS` sequences, the longest count: the others wait.
    """
    longest = sorted(lengths, reverse=True)[:MAX_NUM_SEQS]
    return max(MIN_BLOCKS, sum(-(-length // cache.block_size) + 1 for length in longest))
