"""`afina serve` and `afina bench-serve`; without the extra `serve`, an error that names it."""

from collections.abc import Mapping
from typing import Any

from afina.io.extras import import_extra
from afina.settings import BenchServeSettings, ServeSettings


def serve(settings: ServeSettings) -> Mapping[str, Any]:
    """Serve until stopped."""
    result: Mapping[str, Any] = import_extra("afina.server.serve", "serve").serve(settings)
    return result


def bench(settings: BenchServeSettings) -> Mapping[str, Any]:
    """Send requests to a server, and plot its latency against the request rate."""
    result: Mapping[str, Any] = import_extra("afina.server.bench", "serve").bench(settings)
    return result
