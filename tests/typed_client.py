"""A client of every public function, for type checkers; nothing runs it."""

from pathlib import Path

import afina


def client(data: Path, run: Path) -> None:
    """Call each public function as a user would."""
    result = afina.train(data, method="lora", rank=8, objective="dpo", dpo={"beta": 0.2})
    folder: Path = result.folder
    afina.plan(data, method="mora", mora={"operator": "sharing"})
    afina.compare(data)
    afina.advise(goal="style")
    afina.evaluate(folder)
    afina.generate(["Hello!"], adapter=folder)
    afina.merge(folder, output_dir="merged")
    afina.combine([f"{run}:0.5"], output_dir="combined")
    afina.extract(run, output_dir="extracted")
    afina.show(run)
    afina.export(run, output="model.gguf")
    base = afina.load_base("embedded")
    afina.load_adapter(run, base)
