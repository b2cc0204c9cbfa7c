"""Settings of `afina mcp`."""

from afina.settings.common import Settings, setting


class MCPSettings(Settings):
    """Settings of `afina mcp`."""

    allow_training: bool = setting(
        "offer training too, and plans of objectives with reward functions, which run Python code",
        False,
    )
