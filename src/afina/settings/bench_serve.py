"""Settings of `afina bench-serve`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class BenchServeSettings(Settings):
    """Settings of `afina bench-serve`."""

    base_url: str = setting("the server", "http://127.0.0.1:8000")
    api_key: str | None = setting(
        "a key of the server; by default what AFINA_KEY or OPENAI_API_KEY says"
    )
    models: list[str] = setting(
        "whom to ask; by default the base and all adapters that are there", []
    )
    request_rates: list[float] = setting("requests a second, one run each", [1.0, 2.0, 4.0])
    duration_seconds: float = setting("length of each run", 20.0, gt=0.0)
    zipf_exponent: float = setting(
        "how unevenly the models are asked: the k-th as often as 1/k^zipf", 1.0, ge=0.0
    )
    prompt_words: int = setting("words of a prompt", 64, ge=1)
    max_new_tokens: int = setting("tokens of an answer", 32, ge=1)
    seed: int = setting("seed of arrivals, models and prompts", 0)
    plot_file: Path = setting("the picture: latency against rate", Path("bench-serve.png"))
