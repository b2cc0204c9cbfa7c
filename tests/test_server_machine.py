"""Random histories of two keys, hostile requests and changing adapters, against what each key gets alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.request import AdapterWeight, GenerationRequest, OutputChunk, SamplingParams
from afina.errors import AfinaError
from afina.models.loading import load_base
from live import make_adapters

KEYS = strategies.sampled_from(["key a", "key b"])
NAMES = strategies.sampled_from(["", "one", "two"])
LENGTHS = strategies.sampled_from([3, 17, 40])
HOSTILE: list[dict[str, Any]] = [
    {"repetition_penalty": 1e38},
    {"presence_penalty": 1e300},
    {"temperature": 1e30, "logit_bias": {5: 3e38}},
    {"top_p": 2.0},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"type": "string", "pattern": "(a|a)*b"}},
    {"stop": ("a", "e")},
    {"stop": ("x" * 20_000,)},
    {"max_new_tokens": 0},
]
_world: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_adapters(
        tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4}, two={"rank": 2}
    )
    base = load_base(str(tiny))
    _world.update(base=base, folder=folder, known={}, hashes={})
    oracle = Engine(base)
    for name in ("", "one", "two"):
        adapters: tuple[AdapterWeight, ...] = ()
        if name:
            entry = oracle.registry.add(name, folder / name)
            _world["hashes"][name], adapters = entry.hash, (AdapterWeight(entry.hash),)
        for length in (3, 17, 40):
            request = GenerationRequest(prompt_of(length), sampling(), adapters)
            _world["known"][name, length] = run_to_completion(oracle, [request])[0][1]
    oracle.stop()


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(10 + (7 * n + length) % 200 for n in range(length))


def sampling() -> SamplingParams:
    return SamplingParams(6, ignore_eos=True)


@dataclass
class Asked:
    """An honest request and its outputs."""

    expected: list[int]
    tokens: list[int]
    last: OutputChunk | None = None
    cancelled: bool = False
    first_step: int | None = None
    begin: int = 0


class ServerMachine(RuleBasedStateMachine):
    """Two clients of one small engine."""

    @initialize()
    def begin(self) -> None:
        self.engine = Engine(
            _world["base"],
            EngineConfig(max_num_batched_tokens=48, max_num_seqs=4, max_num_waiting=40),
        )
        self.asked: list[Asked] = []
        self.handles: list[Any] = []
        for name in ("one", "two"):
            self.engine.registry.add(name, _world["folder"] / name)

    def _add(self, key: str, name: str, length: int, params: SamplingParams, listen: Any) -> Any:
        entry = self.engine.registry.get(name) if name else None
        if name and entry is None:
            return None
        adapters = (AdapterWeight(entry.hash),) if entry else ()
        request = GenerationRequest(
            prompt_of(length), params, adapters, client=key, cache_salt=key, request_id="r"
        )
        return self.engine.add_request(request, listen)

    @rule(key=KEYS, name=NAMES, length=LENGTHS)
    def ask(self, key: str, name: str, length: int) -> None:
        one = Asked(_world["known"][name, length], [], begin=self.engine.steps)

        def listen(chunk: OutputChunk) -> None:
            one.tokens += chunk.token_ids
            one.last = chunk

        handle = self._add(key, name, length, sampling(), listen)
        if handle is not None:
            self.asked.append(one)
            self.handles.append((handle, one))

    @rule(key=KEYS, name=NAMES, hostile=strategies.sampled_from(HOSTILE), length=LENGTHS)
    def attack(self, key: str, name: str, hostile: dict[str, Any], length: int) -> None:
        try:
            params = SamplingParams(**{"max_new_tokens": 6, **hostile})
            self._add(key, name, length, params, lambda chunk: 1 / 0)
        except AfinaError:
            pass

    @rule(key=KEYS, name=NAMES, times=strategies.integers(1, 4), hangs_up=strategies.booleans())
    def embed(self, key: str, name: str, times: int, hangs_up: bool) -> None:
        entry = self.engine.registry.get(name) if name else None
        adapters = (AdapterWeight(entry.hash),) if entry else ()
        future = self.engine.embed([prompt_of(40)] * times, adapters, client=key, cache_salt=key)
        if hangs_up:
            future.cancel()

    @rule(which=strategies.integers(0, 50))
    def hang_up(self, which: int) -> None:
        if self.handles:
            handle, one = self.handles[which % len(self.handles)]
            one.cancelled = True
            self.engine.abort(handle)

    @rule(name=strategies.sampled_from(["one", "two"]))
    def remove_or_add(self, name: str) -> None:
        if self.engine.registry.get(name) is None:
            self.engine.registry.add(name, _world["folder"] / name)
        else:
            self.engine.registry.remove(name)

    @rule(steps=strategies.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @invariant()
    def who_has_ended_has_what_is_theirs(self) -> None:
        for one in getattr(self, "asked", []):
            if one.cancelled:
                assert one.tokens == one.expected[: len(one.tokens)]
            elif one.last is not None and one.last.finish_reason is not None:
                assert one.last.finish_reason == "length", one.last.error
                assert one.tokens == one.expected

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            self.engine.step()
            if not self.engine._live and not self.engine._messages:
                break
        assert not self.engine._live and not self.engine._num_live
        assert all(one.last is not None and one.last.finish_reason for one in self.asked)
        self.who_has_ended_has_what_is_theirs()
        pool, tree = self.engine.memory.pool, self.engine.memory.tree
        loaded = sum(one.pages for one in self.engine.memory.residents.values())
        assert pool.num_free_blocks + len(tree) + loaded == pool.count
        assert all(not one.ref_count for one in self.engine.memory.residents.values())
        self.engine.stop()


TestServerMachine = pytest.mark.slow(ServerMachine.TestCase)
TestServerMachine.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
