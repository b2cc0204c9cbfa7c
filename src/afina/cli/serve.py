"""`afina serve` and `afina bench-serve`: what they need beyond afina itself is an extra; this says so where it is missing."""

from collections.abc import Mapping
from typing import Any

from afina.errors import SettingsError
from afina.settings import BenchServeSettings, ServeSettings


def serve(settings: ServeSettings) -> Mapping[str, Any]:
    """Serve until told to stop."""
    try:
        from afina.server import serve as server
    except ImportError as error:
        raise missing_extra_error(error) from None
    return server.serve(settings)


def bench(settings: BenchServeSettings) -> Mapping[str, Any]:
    """Load a server, and draw its latency against the rate."""
    try:
        from afina.server import bench as load
    except ImportError as error:
        raise missing_extra_error(error) from None
    return load.bench(settings)


def missing_extra_error(error: ImportError) -> SettingsError:
    """What to install; an import of afina's own that fails is no matter of extras."""
    if (error.name or "afina").partition(".")[0] == "afina":
        raise error
    return SettingsError(f"{error.name} is not installed", hint="pip install 'afina[serve]'")
