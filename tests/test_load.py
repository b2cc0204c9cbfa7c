"""`afina chat --base-url` and `afina bench-serve`, as typed, against a real server."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from afina.cli.main import parse, run
from afina.server.bench import RequestTiming, bench, summarize
from afina.settings import BenchServeSettings
from live import Live, live, make_adapters


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapters = make_adapters(
        tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4}, two={"rank": 8}
    )
    with live(
        base=str(tiny), adapters=[adapters], state_dir=tmp_path_factory.mktemp("state")
    ) as running:
        yield running


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.slow
def test_a_conversation_with_a_server(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*lines: str) -> str:
        typed(monkeypatch, *lines)
        assert run(["chat", "--base-url", server.url, "--max-new-tokens", "8"]) == 0
        return capsys.readouterr().out.strip()

    def expected(model: str) -> str:
        ask = [{"role": "user", "content": "say sol"}]
        got = server.client().chat.completions.create(
            model=model, messages=ask, temperature=0, max_tokens=8
        )  # type: ignore[arg-type]
        return (got.choices[0].message.content or "").strip()

    assert say("say sol") == expected(server.state.base_name)
    assert say("/model one", "say sol") == expected("one")
    assert say("/model one:0.5,two:0.5", "say sol") == expected("one:0.5,two:0.5")
    typed(monkeypatch, "say sol", "/new", "say sol")
    assert (
        run(["chat", "--base-url", server.url, "--model", "nobody"]) == 0
    )  # told, and the conversation goes on
    assert capsys.readouterr().err.count("model 'nobody' does not exist") == 2


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "the server cannot be reached" in capsys.readouterr().err
    assert run(["chat", "--base-url", "http://127.0.0.1:9", "--base", "embedded"]) == 2


@pytest.mark.slow
def test_load_is_measured_and_drawn(server: Live, tmp_path: Path) -> None:
    settings = BenchServeSettings(
        base_url=server.url,
        request_rates=[10.0, 20.0],
        duration_seconds=1.0,
        prompt_words=6,
        max_new_tokens=5,
        plot_file=tmp_path / "load.png",
    )
    before = {entry.name: entry.hits for entry in server.state.engine.registry.list_adapters()}
    told = bench(settings)
    assert told["models"] == 3 and (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    for got, rate in zip(told["runs"], settings.request_rates, strict=True):
        assert (
            got["failed"] == 0 and got["rate"] == rate and 0.3 * rate < got["requests"] < 3 * rate
        )
        assert 0 < got["first_p50"] <= got["first_p95"] <= got["first_p99"] <= got["last_p99"]
    hits = {
        entry.name: entry.hits - before[entry.name]
        for entry in server.state.engine.registry.list_adapters()
    }
    assert hits["one"] > hits["two"] > 0  # Zipf
    refused = bench(settings.model_copy(update={"models": ["nobody"], "request_rates": [10.0]}))[
        "runs"
    ][0]
    assert (
        refused["failed"] == refused["requests"]
        and refused["first_p50"] is None
        and "nobody" in refused["errors"][0]
    )


def test_figures_of_known_outcomes() -> None:
    outcomes = [RequestTiming(first=n / 100, last=n / 10, pieces=10) for n in range(1, 101)] + [
        RequestTiming(error="503: full")
    ]
    told = summarize(5.0, outcomes, 20.0)
    assert told["requests"] == 101 and told["failed"] == 1 and told["errors"] == ["503: full"]
    assert told["served_per_second"] == 5.0
    assert told["first_p50"] == pytest.approx(0.51) and told["last_p95"] == pytest.approx(9.6)


def test_the_verbs_are_understood() -> None:
    name, settings, _ = parse(["bench-serve", "--request-rates", "1,2.5", "--models", "a,b"])
    assert name == "bench-serve" and isinstance(settings, BenchServeSettings)
    assert settings.request_rates == [1.0, 2.5] and settings.models == ["a", "b"]
    name, served, _ = parse(
        ["serve", "--adapters", "runs,more", "--insecure", "--api-key-file", "k.yaml"]
    )
    assert name == "serve" and [str(path) for path in served.adapters] == ["runs", "more"]  # type: ignore[attr-defined]
