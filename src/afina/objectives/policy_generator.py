"""Completions of a policy that is being trained, by an engine in the same process.

The weights are shared: the adapter is added to the engine before each batch of completions and
removed after it, so that keys and values of its former weights are never read.
"""

from collections.abc import Sequence

from afina.adapters.active import ActiveAdapters
from afina.engine.config import MAX_NUM_SEQS, EngineConfig, block_bytes, blocks_for_lengths
from afina.engine.engine import Engine
from afina.engine.kv_cache import select_cache
from afina.engine.request import Completion, SamplingParams
from afina.errors import BaseError, TrainingError
from afina.models.causal_lm import CausalLM

MAX_POOL_BYTES = 1 << 30  # keys and values; more only where one sequence needs it
MIN_SPARE_BLOCKS = 4  # in addition to the blocks of one sequence


class PolicyGenerator:
    """Engine for rollouts on a base.

    Args:
        max_length: tokens of a prompt and its completion.
        stop_token_ids: tokens that end a completion in addition to the base's own.
    """

    def __init__(self, base: CausalLM, max_length: int, stop_token_ids: frozenset[int]) -> None:
        self.base, self.stop_token_ids = base, stop_token_ids
        cache = select_cache(base)
        size = block_bytes(base, cache)
        alone = blocks_for_lengths([max_length], cache) + MIN_SPARE_BLOCKS
        wanted = blocks_for_lengths([max_length] * MAX_NUM_SEQS, cache)
        blocks = min(wanted, max(MAX_POOL_BYTES // size, alone))
        config = EngineConfig(pool_bytes=blocks * size, max_num_waiting=1 << 20)
        self._engine = Engine(base, config, cache)

    @property
    def memory(self) -> int:
        """Size of the pool of keys and values in bytes."""
        return self._engine.settings.pool_bytes if self._engine.cache.keeps_tokens else 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int,
        temperature: float,
        active: ActiveAdapters,
        run: str,
    ) -> list[Completion]:
        """Return a completion of each prompt; prompt i draws with `seed` + i.

        Args:
            run: cached blocks of different runs are never shared.

        Raises:
            TrainingError: the engine could not complete a prompt.
        """
        sampling = SamplingParams(max_new_tokens, temperature, seed=seed)
        try:
            return self._engine.generate(
                prompts, sampling, active, stop_token_ids=self.stop_token_ids, owner=run
            )
        except BaseError as error:
            raise TrainingError(
                "a completion could not be generated", where=error.where, why=error.why
            ) from error
