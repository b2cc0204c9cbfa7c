"""Nothing that one request does changes the answers of others, whatever it contains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.request import AdapterWeight, GenerationRequest, OutputChunk, SamplingParams
from afina.errors import AdapterError, BaseError, DataError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from live import make_adapters

PROMPT = (5, 6, 9, 12, 30, 31, 5, 7, 8, 11, 40, 9, 13, 14, 15, 16, 17, 18, 60)
GREEDY = SamplingParams(8, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapters(
        tiny,
        tmp_path_factory.mktemp("adapters"),
        one={"rank": 4},
        activated={"rank": 4, "invocation": (7, 8)},
    )


@pytest.fixture(scope="module")
def plain(tiny: Path) -> CausalLM:
    return load_base(str(tiny))


@pytest.fixture
def engine(plain: CausalLM, folders: Path) -> Any:
    made = Engine(plain, EngineConfig(max_num_batched_tokens=40, reserved_names=("base",)))
    for name in ("one", "activated"):
        made.registry.add(name, folders / name)
    yield made
    made.stop()


def adapter(engine: Engine, name: str) -> tuple[AdapterWeight, ...]:
    return (AdapterWeight(engine.registry.get(name).hash),)


def until_idle(engine: Engine, most: int = 400) -> int:
    for step in range(most):
        if not engine._live and not engine._messages:
            return step
        engine.step()
    raise AssertionError("requests do not end")


class BrokenMatcher:
    """A grammar that fails at its nth token, as a panic or an error."""

    is_finished = False

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def allowed_tokens(self, vocabulary: int) -> torch.Tensor:
        if self.left == 0:
            raise self.error
        return torch.ones(vocabulary, dtype=torch.bool)

    def accept_token(self, token: int) -> None:
        self.left -= 1


HOSTILE: dict[str, Callable[[GenerationRequest], dict[str, Any]]] = {
    "a penalty that overflows": lambda r: {"sampling": SamplingParams(8, repetition_penalty=1e38)},
    "a penalty that vanishes": lambda r: {"sampling": SamplingParams(8, repetition_penalty=1e-38)},
    "a bias without an end": lambda r: {
        "sampling": SamplingParams(8, temperature=1e30, logit_bias={5: 3e38, 6: -3e38})
    },
    "a presence beyond float32": lambda r: {"sampling": SamplingParams(8, presence_penalty=1e300)},
    "nothing is allowed": lambda r: {"grammar": BrokenMatcher(0, DataError("its own schema"))},
    "fails later": lambda r: {"grammar": BrokenMatcher(3, ValueError("inside the grammar"))},
    "a stop text of everything": lambda r: {"sampling": SamplingParams(8, stop=("a", "e", " "))},
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_row_that_fails_ends_alone(engine: Engine, attack: str) -> None:
    good = GenerationRequest(PROMPT, GREEDY, adapter(engine, "one"))
    warm = GenerationRequest(PROMPT, SamplingParams(8, temperature=1.0, seed=3, ignore_eos=True))
    alone = [run_to_completion(engine, [one])[0] for one in (good, warm)]
    fields = HOSTILE[attack](good)
    grammar = fields.pop("grammar", None)
    bad = GenerationRequest(PROMPT[:9], **fields)
    ends: dict[str, list[OutputChunk]] = {"good": [], "warm": [], "bad": []}
    for name, request in (("good", good), ("bad", bad), ("warm", warm)):
        engine.add_request(request, ends[name].append)
        if name == "bad" and grammar is not None:
            engine._live[engine._number].sampler.grammar = grammar
    until_idle(engine)
    for name, (_, tokens, _) in zip(("good", "warm"), alone, strict=True):
        assert [t for chunk in ends[name] for t in chunk.token_ids] == tokens
        assert ends[name][-1].finish_reason == "length"
    assert ends["bad"][-1].finish_reason is not None
    assert not engine._num_live and not engine.scheduler.running


class Failure(RuntimeError):
    """What a forward pass fails with in these tests."""


def fail_for(monkeypatch: pytest.MonkeyPatch, engine: Engine, is_guilty: Any) -> list[int]:
    """Let the forward pass of a guilty sequence fail; return the sizes of all passes."""
    runner, sizes = engine._executor._runner, []
    run, read = runner.run, runner.hidden_sums

    def check(chunks: Any) -> None:
        sizes.append(len(chunks))
        if any(is_guilty(sequence) for sequence, _ in chunks):
            raise Failure("one of these")

    def broken_run(chunks: Any, *more: Any) -> Any:
        check(chunks)
        return run(chunks, *more)

    def broken_read(chunks: Any) -> Any:
        check(chunks)
        return read(chunks)

    monkeypatch.setattr(runner, "run", broken_run)
    monkeypatch.setattr(runner, "hidden_sums", broken_read)
    return sizes


@pytest.mark.parametrize("embeds", [False, True])
def test_a_failed_forward_is_tried_again_until_the_guilty_is_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, embeds: bool, caplog: Any
) -> None:
    prompts = [PROMPT[: 6 + n] for n in range(7)]
    requests = [GenerationRequest(p, GREEDY, request_id=f"req-{n}") for n, p in enumerate(prompts)]
    expected = [run_to_completion(engine, [one])[0][1] for one in requests]
    guilty = adapter(engine, "one")
    sizes = fail_for(monkeypatch, engine, lambda s: s.request.adapters == guilty)
    bad = [
        GenerationRequest(PROMPT, GREEDY, guilty, request_id=f"bad-{n}", is_embedding=embeds)
        for n in range(2)
    ]
    outputs = run_to_completion(engine, [*requests[:4], *bad, *requests[4:]])
    assert [tokens for _, tokens, _ in outputs[:4] + outputs[6:]] == expected
    for _, _, last in outputs[4:6]:
        assert last.finish_reason == "error" and "one of these" not in str(last.error)
    logged = {record.request for record in caplog.records if hasattr(record, "request")}
    assert logged == {"bad-0", "bad-1"}
    assert all(record.exc_info for record in caplog.records if hasattr(record, "request"))
    # from now on its requests are tried apart: others are computed once per step
    sizes.clear()
    run_to_completion(engine, [*requests, bad[0]])
    assert sizes.count(7) == 8 and sizes.count(8) == 0


def test_an_engine_without_a_device_ends_and_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_for(monkeypatch, engine, lambda s: True)
    monkeypatch.setattr(
        engine._executor, "_check_device", lambda: (_ for _ in ()).throw(BaseError("no device"))
    )
    seen: list[BaseException] = []
    ends: list[OutputChunk] = []
    engine.on_failure = seen.append
    engine.start()
    engine.add_request(GenerationRequest(PROMPT, GREEDY), ends.append)
    engine._thread.join(250)
    assert not engine.alive and isinstance(seen[0], BaseError) and engine.failure is seen[0]
    assert ends[-1].finish_reason == "error"
    engine._live.clear()


def test_messages_and_cancelled_futures_harm_nobody(engine: Engine) -> None:
    ends: list[OutputChunk] = []
    engine.add_request(GenerationRequest(PROMPT, GREEDY), ends.append)
    future = engine.embed([PROMPT, PROMPT[:5]])
    engine._send(lambda: 1 / 0)
    assert future.cancel()
    late = engine.embed([PROMPT])
    until_idle(engine)
    assert ends[-1].finish_reason == "length"
    assert len(late.result(0)[0]) == engine.base.lm_head.weight.shape[1]
    assert not engine._num_live


def test_an_adapter_that_cannot_enter_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afina.engine import loaded_adapter

    wrap, left = loaded_adapter.get_or_insert_wrapper, [3]

    def broken(base: Any, path: str) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no room")
        return wrap(base, path)

    free = engine.memory.pool.num_free_blocks
    monkeypatch.setattr(loaded_adapter, "get_or_insert_wrapper", broken)
    request = GenerationRequest(PROMPT, GREEDY, adapter(engine, "one"))
    other = GenerationRequest(PROMPT, GREEDY)
    (_, _, bad), (_, _, good) = run_to_completion(engine, [request, other])
    assert bad.finish_reason == "error" and good.finish_reason == "length"
    engine.memory.tree.forget_adapter("")
    assert engine.memory.pool.num_free_blocks >= free - len(engine.memory.tree)
    monkeypatch.undo()
    assert run_to_completion(engine, [request])[0][2].finish_reason == "length"


# ---- embeddings


@pytest.mark.parametrize("name", ["", "one", "activated"])
@pytest.mark.parametrize("invoked", [True, False])
def test_embeddings_act_as_the_chats_route_does(
    engine: Engine, plain: CausalLM, name: str, invoked: bool
) -> None:
    """In pieces of 40 tokens, beside others; an adapter that is never invoked changes nothing."""
    prompt = (PROMPT if invoked else tuple(t for t in PROMPT if t != 7)) * 5
    adapters = adapter(engine, name) if name else ()
    future = engine.embed([prompt, PROMPT], adapters)
    engine.add_request(GenerationRequest(PROMPT, GREEDY), lambda chunk: None)
    until_idle(engine)
    loaded = engine.memory.load(engine.registry.acquire((adapters[0].adapter,))[0]) if name else 0
    start = 0
    if name == "activated":
        places = [n for n in range(len(prompt)) if prompt[n : n + 2] == (7, 8)]
        start = places[-1] if places else len(prompt)
    from afina.adapters.segments import Segment, Segments

    spans = (Segment(start, len(prompt), adapters[0].adapter, 1.0),) if name else ()
    spans = spans if start < len(prompt) else ()
    with torch.no_grad(), plain.forward_context.use(Segments(spans=spans)):
        tokens, positions = torch.tensor(prompt), torch.arange(len(prompt))
        hidden = plain.hidden_states(tokens, positions, (0, len(prompt))).float()
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=-1)
    assert torch.allclose(torch.tensor(future.result(0)[0]), expected, atol=1e-5)
    if loaded:
        engine.memory.release(adapters[0].adapter)
        engine.registry.release((adapters[0].adapter,))


@pytest.mark.slow
def test_embeddings_are_steps_between_those_of_others(engine: Engine) -> None:
    """200 long texts of one client do not stop the tokens of another."""
    engine.embed([PROMPT * 7] * 60, client="flood")
    steps: list[int] = []
    engine.step()
    engine.add_request(
        GenerationRequest(PROMPT, GREEDY, client="quiet"), lambda chunk: steps.append(engine.steps)
    )
    before = engine.steps
    until_idle(engine, 4000)
    assert steps[0] - before <= 3 and steps[-1] - before <= 3 + len(steps)


# ---- names


@pytest.mark.parametrize("name", ["base", "a,b", "a/b", " a", "", "x" * 201, "é", "-a", "a b"])
def test_one_rule_for_names(engine: Engine, folders: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="name"):
        engine.registry.add(name, folders / "one")
    with pytest.raises(AdapterError, match="name"):
        engine.registry.rename("one", name)


def test_stop_strings_and_schemas_have_bounds(engine: Engine) -> None:
    with pytest.raises(SettingsError, match="stop"):
        engine.add_request(
            GenerationRequest(PROMPT, SamplingParams(8, stop=("a" * 10_001,))), lambda c: None
        )
    schema = {"enum": ["x" * 300_000]}
    with pytest.raises(DataError, match="JSON schema"):
        engine.add_request(
            GenerationRequest(PROMPT, SamplingParams(8, json_schema=schema)), lambda c: None
        )
