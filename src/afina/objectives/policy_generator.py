"""Answers of a policy that is being trained, written by the serving engine in the same process: the weights are shared.

The adapter is lent to the engine before each batch of answers and taken back after it, so that nothing that its former numbers
made is read. Families whose attention cannot be paged, and trained weights, which act alone, are written for plainly.
"""

from collections.abc import Sequence
from dataclasses import replace

from afina.adapters.active import ActiveAdapters
from afina.engine.block_pool import BLOCK_SIZE
from afina.engine.detokenizer import detokenize
from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.model_runner import kv_layer_shapes
from afina.engine.request import AdapterWeight, GenerationRequest, SamplingParams
from afina.errors import BaseError, TrainingError
from afina.evaluation.generate import generate_tokens, stop_token_ids
from afina.models.causal_lm import CausalLM
from afina.objectives.policy import Written

MEMORY = 1 << 30  # bytes for keys and values, where more could be used
RUNNING = 64


class PolicyGenerator:
    """Writes answers on a base. `longest`: tokens of a prompt and its answer; `whole`: what learns takes the layers' place."""

    def __init__(
        self, base: CausalLM, longest: int, stops: frozenset[int], whole: bool = False
    ) -> None:
        self.base, self.stop_token_ids = base, stops
        self._engine = None if whole else _engine(base, longest)

    @property
    def memory(self) -> int:
        """Bytes that keys and values take."""
        return 0 if self._engine is None else self._engine.settings.pool_bytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int,
        temperature: float,
        route: ActiveAdapters | None,
        run: str,
    ) -> list[Written]:
        """An answer to each prompt under `route`; prompt i draws with `seed` + i. Nothing is shared between two `run`s.

        Raises `TrainingError` where the engine cannot answer one.
        """
        if self._engine is None:
            sampling = SamplingParams(max_new_tokens, temperature, seed=seed)
            tokens = generate_tokens(self.base, prompts, sampling, route, stops=self.stop_token_ids)
        else:
            tokens = self._run(
                self._engine, prompts, seed, SamplingParams(max_new_tokens, temperature), route, run
            )
        ends = stop_token_ids(self.base) | self.stop_token_ids
        return [self._written(answer, ends) for answer in tokens]

    def _run(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        seed: int,
        sampling: SamplingParams,
        route: ActiveAdapters | None,
        run: str,
    ) -> list[list[int]]:
        acting = () if route is None else route.apart()
        parts = tuple(AdapterWeight(engine.shelf.add_live(one), one.weight) for one in acting)
        requests = [
            GenerationRequest(
                tuple(prompt),
                replace(sampling, seed=seed + number),
                parts,
                owner=run,
                stop_token_ids=self.stop_token_ids,
            )
            for number, prompt in enumerate(prompts)
        ]
        try:
            answers = run_to_completion(engine, requests)
        finally:
            for part in parts:
                engine.shelf.remove_live(part.adapter)
        for _, _, event in answers:
            if event.finish_reason == "error":
                raise TrainingError(
                    "an answer could not be written", where=self.base.name, why=event.error
                )
        return [tokens for _, tokens, _ in answers]

    def _written(self, tokens: list[int], ends: set[int] | frozenset[int]) -> Written:
        stopped = bool(tokens) and tokens[-1] in ends
        text = detokenize(self.base.tokenizer, tokens[:-1] if stopped else tokens, ())
        return Written(tokens, text.strip(), stopped)


def _engine(base: CausalLM, longest: int) -> Engine | None:
    """An engine with room for as many answers at once as it runs, or for what a GB holds; None where the family has none."""
    try:
        page = sum(layer.numel_per_block for layer in kv_layer_shapes(base)) * base.dtype.itemsize
        one = -(-longest // BLOCK_SIZE) + 1
        pages = min(RUNNING * one, max(MEMORY // page, one + 4))
        settings = EngineConfig(
            pool_bytes=max(4, pages) * page, max_num_seqs=RUNNING, max_num_waiting=1 << 20
        )
        return Engine(base, settings)
    except BaseError:
        return None
