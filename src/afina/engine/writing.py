"""Answers of a policy that is being trained, written by the serving engine in the same process: the weights are shared.

The adapter is lent to the engine before each batch of answers and taken back after it, so that nothing that its former numbers
made is read. Families whose attention cannot be paged, and trained weights, which act alone, are written for plainly.
"""

from collections.abc import Sequence
from dataclasses import replace

from afina.base.model import Base
from afina.engine.generate import generate_tokens, stop_tokens
from afina.engine.pages import PAGE
from afina.engine.request import Part, Request, Sampling
from afina.engine.runner import shapes_of
from afina.engine.serving import Engine, EngineSettings, answer_all
from afina.engine.text import text_of
from afina.errors import BaseError, TrainingError
from afina.objective.rollout import Written
from afina.route.invocation import Route

MEMORY = 1 << 30  # bytes for keys and values, where more could be used
RUNNING = 64


class EngineWriter:
    """Writes answers on a base. `longest`: tokens of a prompt and its answer; `whole`: what learns takes the layers' place."""

    def __init__(self, base: Base, longest: int, stops: frozenset[int], whole: bool = False) -> None:
        self.base, self.stops = base, stops
        self._engine = None if whole else _engine(base, longest)

    @property
    def memory(self) -> int:
        """Bytes that keys and values take."""
        return 0 if self._engine is None else self._engine.settings.memory

    def write(
        self, prompts: Sequence[Sequence[int]], seed: int, max_new_tokens: int, temperature: float, route: Route | None,
        run: str,
    ) -> list[Written]:  # fmt: skip
        """An answer to each prompt under `route`; prompt i draws with `seed` + i. Nothing is shared between two `run`s.

        Raises `TrainingError` where the engine cannot answer one.
        """
        if self._engine is None:
            sampling = Sampling(max_new_tokens, temperature, seed=seed)
            tokens = generate_tokens(self.base, prompts, sampling, route, stops=self.stops)
        else:
            tokens = self._run(self._engine, prompts, seed, Sampling(max_new_tokens, temperature), route, run)
        ends = stop_tokens(self.base) | self.stops
        return [self._written(answer, ends) for answer in tokens]

    def _run(
        self, engine: Engine, prompts: Sequence[Sequence[int]], seed: int, sampling: Sampling, route: Route | None, run: str
    ) -> list[list[int]]:
        acting = () if route is None else route.apart()
        parts = tuple(Part(engine.shelf.lend(one), one.weight) for one in acting)
        requests = [
            Request(tuple(prompt), replace(sampling, seed=seed + number), parts, owner=run, stops=self.stops)
            for number, prompt in enumerate(prompts)
        ]
        try:
            answers = answer_all(engine, requests)
        finally:
            for part in parts:
                engine.shelf.take_back(part.adapter)
        for _, _, event in answers:
            if event.finish == "error":
                raise TrainingError("an answer could not be written", where=self.base.name, why=event.error)
        return [tokens for _, tokens, _ in answers]

    def _written(self, tokens: list[int], ends: set[int] | frozenset[int]) -> Written:
        stopped = bool(tokens) and tokens[-1] in ends
        text = text_of(self.base.tokenizer, tokens[:-1] if stopped else tokens, ())
        return Written(tokens, text.strip(), stopped)


def _engine(base: Base, longest: int) -> Engine | None:
    """An engine with room for as many answers at once as it runs, or for what a GB holds; None where the family has none."""
    try:
        page = sum(layer.numbers for layer in shapes_of(base)) * base.dtype.itemsize
        one = -(-longest // PAGE) + 1
        pages = min(RUNNING * one, max(MEMORY // page, one + 4))
        settings = EngineSettings(memory=max(4, pages) * page, most_running=RUNNING, most_waiting=1 << 20)
        return Engine(base, settings)
    except BaseError:
        return None
