"""The serving engine answers as the base and one adapter alone would, whatever is beside, loaded, replaced or sent back."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import attach, detach
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.segments import NO_ADAPTERS
from afina.adapters.target_selection import resolve_target_modules
from afina.engine.adapter_registry import AdapterRecord
from afina.engine.block_pool import BLOCK_SIZE, BlockPool, KVLayerShape
from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.prefix_cache import Key, PrefixCache, block_keys
from afina.engine.request import AdapterWeight, GenerationRequest, OutputChunk, SamplingParams
from afina.errors import AdapterError, BusyError, DataError
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from reference_decoder import reference_tokens

INVOCATION = (7, 8)
KINDS = {
    "lora4": AdapterConfig("lora", (), rank=4),
    "lora3": AdapterConfig("lora", (), rank=3),
    "rslora": AdapterConfig("lora", (), rank=8, scaling="rslora"),
    "dora": AdapterConfig("dora", (), rank=4),
    "mora": AdapterConfig("mora", (), rank=2),
    "alora": AdapterConfig("lora", (), rank=5, invocation=INVOCATION),
    "amora": AdapterConfig("mora", (), rank=3, invocation=INVOCATION),
}


def make_adapters(base: CausalLM, folder: Path, seeds: int = 1) -> dict[str, Path]:
    """Random adapters of every kind, loud enough to change every answer."""
    made = {}
    for kind, spec in KINDS.items():
        for seed in range(seeds):
            adapter = attach(
                base.model,
                base.forward_context,
                "new",
                replace(
                    spec,
                    target_modules=resolve_target_modules(
                        base.model, "all-linear", None, any_kind=False
                    ),
                ),
                seed,
            )
            generator = torch.Generator().manual_seed(seed + 1)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            made[f"{kind}-{seed}"] = folder / f"{kind}-{seed}"
            save_adapter(adapter, base, made[f"{kind}-{seed}"])
            detach(base.model, adapter)
    return made


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(load_base(str(tiny)), tmp_path_factory.mktemp("adapters"), seeds=2)


class Alone:
    """The oracle: each prompt by itself, through the base with its adapters and nothing else."""

    def __init__(self, tiny: Path, adapters: dict[str, Path]) -> None:
        self.base, self.adapters = load_base(str(tiny)), adapters
        self._known: dict[object, list[int]] = {}

    def answer(
        self, prompt: tuple[int, ...], names: tuple[tuple[str, float], ...], length: int
    ) -> list[int]:
        key = (prompt, names, length)
        if key not in self._known:
            on = [
                load_adapter(self.adapters[name], self.base, f"a{i}")
                for i, (name, _) in enumerate(names)
            ]
            routes = [
                adapter.active.scaled(weight)
                for adapter, (_, weight) in zip(on, names, strict=True)
            ]
            route = ActiveAdapters.combine(routes)
            self._known[key] = reference_tokens(
                self.base, [prompt], SamplingParams(max_new_tokens=length), route
            )[0]
            for adapter in on:
                detach(self.base.model, adapter)
        return self._known[key]


@pytest.fixture(scope="module")
def alone(tiny: Path, adapters: dict[str, Path]) -> Alone:
    return Alone(tiny, adapters)


def engine_on(tiny: Path, adapters: dict[str, Path], pages: int = 400, **settings: int) -> Engine:
    base = load_base(str(tiny))
    probe = Engine(base)
    size = probe.memory.pool.page_bytes
    engine = Engine(base, EngineConfig(pool_bytes=pages * size, **settings))
    for name, folder in adapters.items():
        engine.registry.add(name, folder)
    return engine


def parts(engine: Engine, names: tuple[tuple[str, float], ...]) -> tuple[AdapterWeight, ...]:
    entries = [(engine.registry.get(name), weight) for name, weight in names]
    return tuple(AdapterWeight(entry.hash, weight) for entry, weight in entries if entry)


def random_prompt(rng: random.Random, length: int, invoked: bool = True) -> tuple[int, ...]:
    prompt = [rng.randrange(10, 300) for _ in range(length)]
    if invoked and length > 3:
        at = rng.randrange(0, length - 2)
        prompt[at : at + 2] = INVOCATION
    return tuple(prompt)


@pytest.mark.slow
def test_every_kind_of_adapter_side_by_side(
    tiny: Path, adapters: dict[str, Path], alone: Alone
) -> None:
    engine, rng = engine_on(tiny, adapters, max_num_batched_tokens=40), random.Random(1)
    asked = [((), 30)] + [(((name, 1.0),), rng.randrange(4, 60)) for name in adapters]
    asked += [
        ((("lora4-0", 0.5), ("dora-1", -0.5)), 33),
        ((("alora-0", 1.0), ("lora3-1", 0.7)), 35),
    ]
    prompts = [random_prompt(rng, length, rng.random() < 0.8) for _, length in asked]
    requests = [
        GenerationRequest(p, SamplingParams(max_new_tokens=12), parts(engine, n))
        for p, (n, _) in zip(prompts, asked, strict=True)
    ]
    for (names, _), prompt, (_, tokens, last) in zip(
        asked, prompts, run_to_completion(engine, requests), strict=True
    ):
        assert last.finish_reason in ("stop", "length"), last.error
        assert tokens == alone.answer(prompt, names, 12), names
    engine.stop()
    assert engine.memory.pool.num_free_blocks + len(engine.memory.tree) == engine.memory.pool.count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "pages", "running", "host"), [(0, 60, 8, 0), (1, 22, 5, 60_000), (2, 40, 3, 1 << 20)]
)
def test_random_mixes_in_little_memory(
    tiny: Path,
    adapters: dict[str, Path],
    alone: Alone,
    seed: int,
    pages: int,
    running: int,
    host: int,
) -> None:
    """Preemption, eviction of adapters and of prefixes, shared beginnings: the same answers."""
    rng = random.Random(seed)
    engine = engine_on(
        tiny,
        adapters,
        pages,
        max_num_batched_tokens=rng.choice([17, 64]),
        max_num_seqs=running,
        host_cache_bytes=host,
    )
    heads = [random_prompt(rng, n) for n in (16, 33, 48)]
    asked = []
    for _ in range(30):
        names = tuple(
            (name, rng.choice([1.0, 0.5]))
            for name in rng.sample(sorted(adapters), rng.choice([0, 1, 1, 1, 2]))
        )
        prompt = rng.choice(heads) + random_prompt(rng, rng.randrange(1, 30), rng.random() < 0.5)
        asked.append((names, prompt, rng.randrange(1, 25)))
    requests = [
        GenerationRequest(p, SamplingParams(max_new_tokens=n), parts(engine, names))
        for names, p, n in asked
    ]
    for (names, prompt, length), (_, tokens, last) in zip(
        asked, run_to_completion(engine, requests), strict=True
    ):
        assert last.finish_reason in ("stop", "length"), last.error
        assert tokens == alone.answer(prompt, names, length)
    assert engine.memory.evictions and engine.reused
    if pages == 22:
        assert engine.scheduler.preemptions
    engine.stop()
    assert engine.memory.pool.num_free_blocks + len(engine.memory.tree) == engine.memory.pool.count


@pytest.mark.slow
def test_activated_adapters_share_what_came_before(
    tiny: Path, adapters: dict[str, Path], alone: Alone
) -> None:
    engine, rng = engine_on(tiny, adapters), random.Random(3)
    history = random_prompt(rng, 100, invoked=False)
    turn = history + INVOCATION + random_prompt(rng, 5, invoked=False)
    (_, first, _), *_ = run_to_completion(
        engine, [GenerationRequest(history, SamplingParams(max_new_tokens=3))]
    )
    assert first == alone.answer(history, (), 3)
    for name in ("alora-0", "alora-1", "amora-0"):
        (_, tokens, last), *_ = run_to_completion(
            engine,
            [
                GenerationRequest(
                    turn, SamplingParams(max_new_tokens=8), parts(engine, ((name, 1.0),))
                )
            ],
        )
        assert tokens == alone.answer(turn, ((name, 1.0),), 8)
        assert (
            last.num_cached_tokens == 96
        )  # all whole pages before the invocation, from the base or another adapter
    (_, _, plain), *_ = run_to_completion(
        engine,
        [
            GenerationRequest(
                turn, SamplingParams(max_new_tokens=3), parts(engine, (("lora4-0", 1.0),))
            )
        ],
    )
    assert plain.num_cached_tokens == 0  # one that acts everywhere shares with nobody else


def test_reading_ahead_goes_on_after_requests_that_went_away(
    tiny: Path, adapters: dict[str, Path]
) -> None:
    """Cancelled while their adapters were read: nobody fetches what was read for them."""
    engine = engine_on(tiny, adapters)
    (content,) = engine.registry.acquire((parts(engine, (("dora-0", 1.0),))[0].adapter,))
    assert isinstance(content, AdapterRecord)
    for number in range(8):
        engine.memory.prefetch(replace(content, hash=f"gone {number}"))
    for future in list(engine.memory._ahead.values()):
        future.result()
    engine.memory.prefetch(content)
    assert content.hash in engine.memory._ahead
    assert len(engine.memory._ahead) == 8
    assert not engine.memory.is_ready(replace(content, hash="gone 0"))  # the oldest one went
    engine.scheduler.virtual_tokens |= {"away": 3.0}
    engine.scheduler._skipped_steps |= {"away": 60}
    engine.scheduler.forget_idle_clients()
    assert not engine.scheduler.virtual_tokens and not engine.scheduler._skipped_steps
    engine.stop()


@pytest.mark.slow
def test_replacing_while_it_runs(tiny: Path, adapters: dict[str, Path], alone: Alone) -> None:
    """In-flight requests finish on the version that they started with; later ones get the new one."""
    engine, rng = engine_on(tiny, {"tone": adapters["lora4-0"]}), random.Random(4)
    prompts = [random_prompt(rng, 30) for _ in range(12)]
    got: list[tuple[str, tuple[int, ...], list[int]]] = []

    def ask(prompt: tuple[int, ...], version: str) -> None:
        tokens: list[int] = []
        got.append((version, prompt, tokens))
        engine.add_request(
            GenerationRequest(
                prompt, SamplingParams(max_new_tokens=10), parts(engine, (("tone", 1.0),))
            ),
            lambda e: tokens.extend(e.token_ids),
        )

    version = 0
    for prompt in prompts:
        ask(prompt, f"lora4-{version}")
        for _ in range(rng.randrange(4)):
            engine.step()
        version = 1 - version
        engine.registry.replace("tone", adapters[f"lora4-{version}"])
    while engine.stats()["running"] or engine.stats()["waiting"]:
        engine.step()
    for name, prompt, tokens in got:
        assert tokens == alone.answer(prompt, ((name, 1.0),), 10)
    engine.registry.remove("tone")
    engine.step()
    assert engine.stats()["adapters_loaded"] == 0


def test_a_file_that_changes_is_not_served(
    tiny: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(adapters["lora4-0"], tmp_path / "a")
    engine = engine_on(tiny, {"a": tmp_path / "a", "b": adapters["lora4-1"]})
    part_a, part_b = parts(engine, (("a", 1.0),)), parts(engine, (("b", 1.0),))
    data = bytearray((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(data)
    bad, good = run_to_completion(
        engine,
        [
            GenerationRequest((5, 6), adapters=part_a),
            GenerationRequest((5, 6), SamplingParams(max_new_tokens=3), part_b),
        ],
    )
    assert bad[2].finish_reason == "error"
    assert "not the file" in str(bad[2].error)
    assert good[2].finish_reason == "length"


def test_a_broken_adapter_harms_only_who_asks_for_it(
    tiny: Path, adapters: dict[str, Path], alone: Alone, tmp_path: Path
) -> None:
    base = load_base(str(tiny))
    broken = attach(
        base.model,
        base.forward_context,
        "broken",
        replace(
            KINDS["lora4"],
            target_modules=resolve_target_modules(base.model, "all-linear", None, False),
        ),
    )
    with torch.no_grad():
        broken.parameters()[1].fill_(float("nan"))
    save_adapter(broken, base, tmp_path / "broken")
    engine = engine_on(tiny, {"broken": tmp_path / "broken", "lora4-0": adapters["lora4-0"]})
    prompt = (9, 11, 13)
    names = [(("broken", 1.0),), (("lora4-0", 1.0),), ()]
    answers = run_to_completion(
        engine,
        [
            GenerationRequest(prompt, SamplingParams(max_new_tokens=5), parts(engine, n))
            for n in names
        ],
    )
    assert answers[0][2].finish_reason == "error" and "not finite" in str(answers[0][2].error)
    for (_, tokens, _), name in zip(answers[1:], names[1:], strict=True):
        assert tokens == alone.answer(prompt, name, 5)


def test_nobody_starves(tiny: Path, adapters: dict[str, Path]) -> None:
    """One who floods the queue does not delay another by more than a request or two."""
    engine = engine_on(tiny, adapters, max_num_seqs=2)
    order: list[str] = []

    def ask(client: str) -> None:
        request = GenerationRequest(
            random_prompt(random.Random(len(order)), 20),
            SamplingParams(max_new_tokens=5, ignore_eos=True),
            client=client,
        )
        engine.add_request(request, lambda e: order.append(client) if e.finish_reason else None)

    for _ in range(20):
        ask("flood")
    for _ in range(3):
        ask("quiet")
    while len(order) < 23:
        engine.step()
    assert [i for i, who in enumerate(order) if who == "quiet"][-1] <= 8


def test_what_cannot_be_answered_is_refused(
    tiny: Path, adapters: dict[str, Path], base: CausalLM, tmp_path: Path
) -> None:
    engine = engine_on(tiny, adapters, pages=8, max_num_waiting=1, max_num_seqs=1)
    with pytest.raises(DataError, match="does not fit"):
        engine.add_request(
            GenerationRequest(tuple(range(5, 155)), SamplingParams(max_new_tokens=20)),
            lambda e: None,
        )
    with pytest.raises(DataError, match="prompt of 0 tokens"):
        engine.add_request(GenerationRequest(()), lambda e: None)
    with pytest.raises(AdapterError, match="no adapter with hash"):
        engine.add_request(
            GenerationRequest((5,), adapters=(AdapterWeight("f" * 64),)), lambda e: None
        )
    for _ in range(2):
        engine.add_request(
            GenerationRequest((5, 6), SamplingParams(max_new_tokens=4)), lambda e: None
        )
    with pytest.raises(BusyError):
        engine.add_request(
            GenerationRequest((5, 6), SamplingParams(max_new_tokens=4)), lambda e: None
        )
    with pytest.raises(AdapterError, match="there is an adapter named"):
        engine.registry.add("lora4-0", adapters["lora4-1"])
    full = attach(
        base.model,
        base.forward_context,
        "full",
        AdapterConfig(
            "full", resolve_target_modules(base.model, "all-linear", None, any_kind=False)
        ),
    )
    save_adapter(full, base, tmp_path / "full")
    with pytest.raises(AdapterError, match="cannot be served"):
        engine.registry.add("full", tmp_path / "full")


@pytest.mark.slow
def test_cancelled_and_stopped(tiny: Path, adapters: dict[str, Path]) -> None:
    engine = engine_on(tiny, adapters)
    engine.start()
    ends: list[OutputChunk] = []
    request = GenerationRequest((5, 6, 9), SamplingParams(max_new_tokens=150, ignore_eos=True))
    tickets = [
        engine.add_request(request, lambda e: ends.append(e) if e.finish_reason else None)
        for _ in range(3)
    ]
    engine.abort(tickets[1])
    engine.stop(drain=20.0)
    assert sorted(str(e.finish_reason) for e in ends) == ["cancelled", "length", "length"]
    with pytest.raises(BusyError, match="stopping"):
        engine.add_request(request, lambda e: None)


@pytest.mark.slow
def test_merged_mode(tiny: Path, adapters: dict[str, Path], alone: Alone) -> None:
    """While one adapter has nearly all tokens it is merged; answers stay, others get theirs, and W is as it was."""
    engine = engine_on(tiny, adapters, merged_weights_bytes=1 << 20)
    weights = {name: p.clone() for name, p in engine.base.model.state_dict().items()}
    engine._merging._pays = lambda: (
        True
    )  # the clock decides otherwise, and a test must not depend on it
    rng = random.Random(5)
    hot, other = (("rslora-0", 1.0),), (("lora4-1", 1.0),)
    for round_ in range(14):
        names = [hot] * 5 + ([other] if round_ % 3 == 2 else [])
        texts = [random_prompt(rng, rng.randrange(3, 30)) for _ in names]
        requests = [
            GenerationRequest(t, SamplingParams(max_new_tokens=9), parts(engine, n))
            for t, n in zip(texts, names, strict=True)
        ]
        for text, name, (_, tokens, _) in zip(
            texts, names, run_to_completion(engine, requests), strict=True
        ):
            assert tokens == alone.answer(text, name, 9)
    assert engine.stats()["merged_steps"] > 10
    assert engine.registry.get("rslora-0").state == "merged"
    for _ in range(14):
        requests = [
            GenerationRequest(
                random_prompt(rng, 9), SamplingParams(max_new_tokens=9), parts(engine, other)
            )
            for _ in range(3)
        ]
        run_to_completion(engine, requests)
    assert engine.registry.get("rslora-0").state == "host"
    engine.stop()
    after = engine.base.model.state_dict()
    assert all(
        torch.equal(after[name.replace(".base.", ".")], value)
        for name, value in weights.items()
        if name in after
    )


@pytest.mark.slow
def test_an_adapter_that_is_being_trained_is_lent(
    tiny: Path, adapters: dict[str, Path], alone: Alone
) -> None:
    """Its numbers are used where they are; after a change, nothing that the former ones made is read."""
    engine = engine_on(tiny, adapters)
    base = engine.base
    learning = attach(
        base.model,
        base.forward_context,
        "run-0",
        AdapterConfig(
            "lora", resolve_target_modules(base.model, "all-linear", None, False), rank=4
        ),
    )
    prompt = random_prompt(random.Random(7), 60)
    for seed in (1, 2):
        with torch.no_grad():
            for parameter in learning.parameters():
                parameter.copy_(
                    0.3
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                )
        lent = engine.registry.add_live(learning.active.adapters[0])
        requests = [
            GenerationRequest(prompt, SamplingParams(max_new_tokens=8), (AdapterWeight(lent),))
            for _ in range(3)
        ]
        requests.append(
            GenerationRequest(
                prompt, SamplingParams(max_new_tokens=8), parts(engine, (("dora-0", 1.0),))
            )
        )
        *ours, (_, other, _) = run_to_completion(engine, requests)
        expected = reference_tokens(
            base, [prompt], SamplingParams(max_new_tokens=8), learning.active
        )[0]
        assert [tokens for _, tokens, _ in ours] == [expected] * 3
        assert other == alone.answer(prompt, (("dora-0", 1.0),), 8)
        engine.registry.remove_live(lent)
    engine.step()
    assert not engine.memory.tree.forget_adapter("run-0@1")


def test_an_adapter_that_replaces_base_modules_runs_alone_in_its_steps(tiny: Path) -> None:
    base = load_base(str(tiny))
    paths = resolve_target_modules(base.model, "all-linear", None, False)
    full = attach(base.model, base.forward_context, "full", AdapterConfig("full", paths))
    lora = attach(base.model, base.forward_context, "lora", AdapterConfig("lora", paths, rank=4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*full.parameters(), *lora.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    lora.train(False)
    engine, sampling = Engine(base), SamplingParams(max_new_tokens=8)
    prompt = random_prompt(random.Random(7), 20)
    sides = [full.active, lora.active, BASE_ONLY]
    hashes = [[engine.registry.add_live(one) for one in side.adapters] for side in sides]
    requests = [
        GenerationRequest(prompt, sampling, tuple(map(AdapterWeight, hashes[number])))
        for number in (0, 1, 2, 0, 2, 1)
    ]
    expected = [reference_tokens(base, [prompt], sampling, side)[0] for side in sides]
    assert len(set(map(tuple, expected))) == 3
    tokens = [tokens for _, tokens, _ in run_to_completion(engine, requests)]
    assert tokens == [expected[number] for number in (0, 1, 2, 0, 2, 1)]


def test_an_interrupted_generation_leaves_nothing_in_the_engine(tiny: Path) -> None:
    engine = Engine(load_base(str(tiny)))

    def broken(_: int, chunk: OutputChunk) -> None:
        raise RuntimeError("the terminal is closed")

    with pytest.raises(RuntimeError, match="terminal"):
        engine.generate([[5, 6, 9]] * 3, SamplingParams(8), on_output=broken)
    assert not engine.scheduler.running and not engine.scheduler.num_waiting
    with pytest.raises(DataError, match="a prompt of 0 tokens") as caught:
        engine.generate([[5, 6, 9], []], SamplingParams(8))
    assert caught.value.where == "prompt 2"
    assert len(engine.generate([[5, 6, 9]], SamplingParams(8))[0].token_ids) == 8


def test_pages_of_an_adapter_named_twice_are_forgotten_once() -> None:
    tree = PrefixCache()
    [key] = block_keys(range(BLOCK_SIZE), [("one", 1.0, 0), ("one", 0.5, 0)], "", 0, 1)
    tree.release([tree.insert(tree.root, key, 7)])
    assert tree.forget_adapter("one") == [7]
    assert not len(tree)
    assert tree.forget_adapter("one") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "dtype"), [("nf4", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")]
)
def test_other_bases(tiny: Path, tmp_path: Path, quantization: str, dtype: str) -> None:
    """In 4 bits, and in 16: logits at each step as alone, up to what 16 bits round."""
    base = load_base(str(tiny), dtype=dtype, quantization=quantization)
    made = make_adapters(base, tmp_path)
    engine = Engine(base)
    for name, folder in made.items():
        engine.registry.add(name, folder)
    rng = random.Random(6)
    names = [(), *(((name, 1.0),) for name in made)]
    prompts = [random_prompt(rng, rng.randrange(5, 40)) for _ in names]
    sampling = SamplingParams(max_new_tokens=1, logprobs=5)
    requests = [
        GenerationRequest(p, sampling, parts(engine, n))
        for p, n in zip(prompts, names, strict=True)
    ]
    told: list[OutputChunk] = []
    for request in requests:
        engine.add_request(request, lambda e: told.append(e))
    while len(told) < len(requests):
        engine.step()
    engine.stop()
    for event, prompt, who in zip(told, prompts, names, strict=True):
        adapter = load_adapter(made[who[0][0]], base, "alone") if who else None
        run = torch.tensor(prompt), torch.arange(len(prompt)), (0, len(prompt))
        table = adapter.active.segments(run[0], run[2]) if adapter else NO_ADAPTERS
        with torch.no_grad(), base.forward_context.use(table):
            expected = base.next_token_logits(*run)[0].log_softmax(-1)
        if adapter:
            detach(base.model, adapter)
        for token, logprob in event.logprobs[0].top:
            assert abs(logprob - float(expected[token])) < (1e-4 if dtype == "float32" else 0.25), (
                who
            )


def test_embeddings(tiny: Path, adapters: dict[str, Path]) -> None:
    engine = engine_on(tiny, adapters)
    futures = [
        engine.embed([(5, 6, 9), (5, 6)]),
        engine.embed([(5, 6, 9)], parts(engine, (("lora4-0", 1.0),))),
    ]
    while not all(future.done() for future in futures):
        engine.step()
    (one, _), (other,) = (future.result(0) for future in futures)
    assert abs(sum(x * x for x in one) - 1) < 1e-5
    assert one != other


# ---- pages and prefixes by themselves


def test_pages_move_aside_for_an_adapter() -> None:
    pool = BlockPool(8, [KVLayerShape(1, 2)], torch.float32, torch.device("cpu"))
    moved: dict[int, int] = {}
    pool.on_block_moved = lambda old, new: moved.update({old: new})
    pages = [pool.allocate() for _ in range(8)]
    for page in pages:
        pool.memory[page] = page
    for page in (0, 2, 4, 5, 6):
        pool.free(page)
    start = pool.allocate_contiguous(4)
    assert start is not None
    assert pool.num_free_blocks == 1
    for old, new in moved.items():
        assert bool((pool.memory[new] == old).all())
        assert new not in range(start, start + 4)
    assert pool.allocate_contiguous(2) is None
    pool.free_contiguous(start, 4)
    assert pool.num_free_blocks == 5


def test_prefix_tree_forgets_the_longest_unused_leaf_first() -> None:
    tree = PrefixCache()

    def key(n: int) -> Key:
        return (n,) * BLOCK_SIZE, (), ""

    a = tree.insert(tree.root, key(1), 10)
    b = tree.insert(a, key(2), 11)
    c = tree.insert(a, key(3), 12)
    assert tree.insert(a, key(2), 13) is b
    tree.release([a, b])
    assert tree.evict() is None  # b is read by another still, a has children, c is read
    tree.release([c])
    tree.release([b])
    assert [tree.evict() for _ in range(4)] == [12, 11, 10, None]
