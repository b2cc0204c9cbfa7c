"""Settings of `afina sign` and `afina verify`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class SignSettings(Settings):
    """Settings of `afina sign`."""

    adapter: Path = setting("a run or adapter folder", ...)
    private_key: Path = setting("private key: elliptic (P-256, P-384, P-521), PEM", ...)
    base: Path | None = setting(
        "folder of the base, to sign for its tokenizer and chat template too"
    )


class VerifySettings(Settings):
    """Settings of `afina verify`."""

    adapter: Path = setting("a run or adapter folder", ...)
    public_key: Path = setting("public key of the signer (PEM)", ...)
    base: Path | None = setting(
        "folder of the base, to check that it is the one that was signed for"
    )
