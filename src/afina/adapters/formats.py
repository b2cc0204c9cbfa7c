"""Write adapters/formats.json, the formats of the registered methods' files: `make formats`.

Methods of other packages have a file of their own: `python -m afina.adapters.formats NAME FILE`.
"""

import json
import sys
from pathlib import Path

from afina.adapters.base import AdapterLayer
from afina.adapters.registry import METHOD_MODULES, get_method
from afina.io.adapter_formats import PEFT_LORA, AdapterFormat

FORMATS_FILE = Path(__file__).with_name("formats.json")


def format_of(name: str, method: type[AdapterLayer]) -> AdapterFormat:
    """Return the format of the files of the method registered as `name`."""
    names = method.tensor_names
    return AdapterFormat(
        name,
        peft_type=PEFT_LORA if method.peft_fields is not None else f"AFINA_{name.upper()}",
        peft_fields=method.peft_fields,
        replaces_base=method.replaces_base,
        tensors={names[key]: rule for key, rule in method.shape_rules.items()},
        embedding_names={names[key]: other for key, other in method.embedding_names.items()},
        aliases=method.name_aliases,
        low_rank=tuple(names[key] for key in method.low_rank_tensors or ()),
    )


def write_formats(names: list[str], file: Path) -> None:
    """Write the formats of the methods `names` to `file`."""
    formats = {name: format_of(name, get_method(name)).to_json() for name in sorted(names)}
    file.write_text(json.dumps(formats, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write_formats([sys.argv[1]], Path(sys.argv[2]))
    else:
        write_formats(list(METHOD_MODULES), FORMATS_FILE)
