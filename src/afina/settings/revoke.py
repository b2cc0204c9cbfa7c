"""Settings of `afina revoke`."""

from afina.settings.common import Settings, setting


class RevokeSettings(Settings):
    """Settings of `afina revoke`."""

    target: str = setting("an adapter's folder, or its hash", ...)
    reason: str = setting("why it must not be used any more", ...)
