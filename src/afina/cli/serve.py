"""`afina serve` and `afina bench-serve`, and the error where the extra `serve` is missing."""

from collections.abc import Mapping
from typing import Any

from afina.errors import SettingsError
from afina.settings import BenchServeSettings, ServeSettings


def serve(settings: ServeSettings) -> Mapping[str, Any]:
    """Serve until stopped."""
    try:
        from afina.server import serve as server
    except ImportError as error:
        raise missing_extra_error(error) from None
    return server.serve(settings)


def bench(settings: BenchServeSettings) -> Mapping[str, Any]:
    """Send requests to a server, and plot its latency against the request rate."""
    try:
        from afina.server import bench as load
    except ImportError as error:
        raise missing_extra_error(error) from None
    return load.bench(settings)


def missing_extra_error(error: ImportError) -> SettingsError:
    """Return the error that names the extra; re-raise where a module of afina itself is missing."""
    if (error.name or "afina").partition(".")[0] == "afina":
        raise error
    return SettingsError(f"{error.name} is not installed", hint="pip install 'afina[serve]'")
