"""Is every change to a signed adapter found, offline? Bytes one by one, and changes that leave every file valid.

    python benchmarks/audit/tamper.py [--positions 1000] [--publish]

In each file one byte at a time is changed to another, at up to `positions` places (all, where the file is shorter), and
`afina verify` is asked. Sockets are taken away meanwhile.
"""

import argparse
import json
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from packages import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, write_base, write_valid

from afina.audit.base_files import BaseFiles
from afina.audit.file_gate import MANIFEST, SIGNATURE
from afina.audit.provenance import sign, verify
from afina.errors import AfinaError

TARGETS = {"bytes_found": (">=", 1.0), "others_found": (">=", 1.0)}


def keys(place: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place / "key.pem", place / "key.pub"
    private.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def signable(folder: Path, base: Path, seed: int = 0) -> Path:
    """A valid adapter that tells its base and two parents in afina.json."""
    write_valid(folder, seed=seed)
    story = json.loads((folder / METADATA_FILE).read_text())
    story["base"]["hash"] = BaseFiles(base).hash
    parents = [
        {"name": name, "hash": digit * 64, "weight": 0.5, "method": "lora"}
        for name, digit in (("a", "1"), ("b", "2"))
    ]
    (folder / METADATA_FILE).write_text(json.dumps(story | {"parents": parents}))
    return folder


def found(folder: Path, key: Path, base: Path) -> bool:
    """Whether the change is found."""
    try:
        verify(folder, public_key=key, base=base)
    except AfinaError:
        return True
    return False


def bytes_found(folder: Path, key: Path, base: Path, positions: int) -> tuple[int, int, list[str]]:
    """(places tried, found, those that were not)."""
    rng, tried, missed = random.Random(0), 0, []
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        places = (
            range(len(raw))
            if len(raw) <= positions
            else sorted(rng.sample(range(len(raw)), positions))
        )
        for at in places:
            changed = bytearray(raw)
            changed[at] = rng.choice([b for b in range(256) if b != raw[at]])
            file.write_bytes(changed)
            tried += 1
            if not found(folder, key, base):
                missed.append(f"{file.name}:{at}")
        file.write_bytes(raw)
        print(f"{file.name}: {len(places)} of {len(raw)} bytes", flush=True)
    return tried, tried - len(missed), missed


def _json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def others(place: Path, key: tuple[Path, Path], base: Path) -> dict[str, bool]:
    """Changes that leave valid files, each by a name: whether it is found."""
    other_base = shutil.copytree(base, place / "other-base")
    raw = bytearray((other_base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other_base / "model.safetensors").write_bytes(raw)
    other_words = shutil.copytree(base, place / "other-words")
    (other_words / "tokenizer_config.json").write_text('{"chat_template": "evil"}')
    stranger = signable(place / "stranger", base, 9)
    sign(stranger, private_key=key[0], base=base)
    private, public = keys(place)
    acts: dict[str, Callable[[Path], Any]] = {
        "parents in another order, afina.json": lambda f: _json(
            f / METADATA_FILE, lambda t: t["parents"].reverse()
        ),
        "parents in another order, manifest": lambda f: _json(
            f / MANIFEST, lambda t: t["parents"].reverse()
        ),
        "parents in another order, both": lambda f: [
            _json(f / name, lambda t: t["parents"].reverse()) for name in (METADATA_FILE, MANIFEST)
        ],
        "a parent's weight": lambda f: _json(
            f / METADATA_FILE, lambda t: t["parents"][0].update(weight=0.6)
        ),
        "a parent taken out": lambda f: _json(f / METADATA_FILE, lambda t: t["parents"].pop()),
        "another base told, afina.json": lambda f: _json(
            f / METADATA_FILE, lambda t: t["base"].update(name="evil")
        ),
        "another base told, manifest": lambda f: _json(
            f / MANIFEST, lambda t: t["base"].update(hash="0" * 64)
        ),
        "a file more": lambda f: (f / "README.md").write_text("x"),
        "a hidden file more": lambda f: (f / ".gitignore").write_text("x"),
        "a file less": lambda f: (f / CONFIG_FILE).unlink(),
        "a file cut short": lambda f: (f / WEIGHTS_FILE).write_bytes(
            (f / WEIGHTS_FILE).read_bytes()[:-1]
        ),
        "a byte more": lambda f: (f / WEIGHTS_FILE).write_bytes(
            (f / WEIGHTS_FILE).read_bytes() + b"\0"
        ),
        "a blank more in the signature": lambda f: (f / SIGNATURE).write_text(
            (f / SIGNATURE).read_text() + "\n"
        ),
        "the weights of another that is signed": lambda f: shutil.copy(
            stranger / WEIGHTS_FILE, f / WEIGHTS_FILE
        ),
        "manifest and signature of another": lambda f: [
            shutil.copy(stranger / name, f / name) for name in (MANIFEST, SIGNATURE)
        ],
        "the signature of another": lambda f: shutil.copy(stranger / SIGNATURE, f / SIGNATURE),
        "signed again by another key": lambda f: sign(f, private_key=private, base=base),
        "no signature": lambda f: (f / SIGNATURE).unlink(),
        "no manifest": lambda f: (f / MANIFEST).unlink(),
        "two files that have changed names": lambda f: [
            (f / CONFIG_FILE).rename(f / "x"),
            (f / METADATA_FILE).rename(f / CONFIG_FILE),
            (f / "x").rename(f / METADATA_FILE),
        ],
        "a link in the place of a file": lambda f: [
            (f / WEIGHTS_FILE).rename(place / "w"),
            (f / WEIGHTS_FILE).symlink_to(place / "w"),
        ],
    }
    result = {}
    for number, (name, act) in enumerate(acts.items()):
        folder = signable(place / f"other-{number}", base)
        sign(folder, private_key=key[0], base=base)
        assert not found(folder, key[1], base)
        act(folder)
        result[name] = found(folder, key[1], base)
    folder = signable(place / "signed", base)
    sign(folder, private_key=key[0], base=base)
    result["another base"] = found(folder, key[1], other_base)
    result["the base's tokenizer"] = found(folder, key[1], other_words)
    result["another public key"] = found(folder, public, base)
    return result


def main() -> None:
    """Change, ask, count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--publish", action="store_true")
    told = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        base = write_base(place / "base")
        (base / "tokenizer.json").write_text("{}")
        (place / "mine").mkdir()
        key = keys(place / "mine")
        folder = signable(place / "adapter", base)
        sign(folder, private_key=key[0], base=base)
        verify(folder, public_key=key[1], base=base)
        socket.socket = None  # type: ignore[assignment,misc]
        tried, hits, missed = bytes_found(folder, key[1], base, told.positions)
        assert not found(folder, key[1], base)
        rest = others(place, key, base)
    finally:
        shutil.rmtree(place)
    print(
        "bytes not found:",
        missed,
        "\nothers not found:",
        [name for name, hit in rest.items() if not hit],
    )
    figures = {
        "bytes": tried,
        "bytes_found": hits / tried,
        "others": len(rest),
        "others_found": sum(rest.values()) / len(rest),
    }
    if told.publish:
        common.publish(
            "audit_tamper", figures, TARGETS, {"missed": missed, "others": rest}, common.roofline()
        )
    else:
        print(json.dumps({"name": "audit_tamper", "figures": figures, "targets": TARGETS}))


if __name__ == "__main__":
    main()
