"""Settings of `afina bench-serve`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class BenchServeSettings(Settings):
    """Settings of `afina bench-serve`."""

    base_url: str = setting("the server", "http://127.0.0.1:8000")
    api_key: str | None = setting(
        "a key of the server; by default the value of AFINA_KEY or OPENAI_API_KEY"
    )
    models: list[str] = setting(
        "models to request; by default the base and all adapters of the server", []
    )
    request_rates: list[float] = setting("requests per second, one run each", [1.0, 2.0, 4.0])
    duration_seconds: float = setting("seconds of each run", 20.0, gt=0.0)
    zipf_exponent: float = setting(
        "skew of the models' popularity: the k-th is requested in proportion to 1/k^zipf_exponent",
        1.0,
        ge=0.0,
    )
    prompt_words: int = setting("words per prompt", 64, ge=1)
    max_new_tokens: int = setting("tokens per completion", 32, ge=1)
    seed: int = setting("seed of arrivals, models and prompts", 0)
    plot_file: Path = setting("PNG of the plot: latency against rate", Path("bench-serve.png"))
