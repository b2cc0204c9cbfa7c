"""Write llms.txt: commands and pages for language models, from the command table and README.

python docs/llms.py
"""

import re
from pathlib import Path

from afina.cli.command_table import COMMANDS

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| \[([^\]]+)\]\((docs/[\w/.]+)\) \| (.+) \|$", re.MULTILINE)
HEAD = """# afina

> Adapts frozen pretrained models with small adapters (LoRA, DoRA, MoRA, aLoRA, full): plans, trains, evaluates, merges, audits and serves them. Command line, Python (`import afina`), an OpenAI-compatible server and an MCP server.

Every setting is a flag (`--learning-rate 3e-4`), a key of a YAML file (`--config FILE`) and a keyword in Python; `afina COMMAND --help` lists them, `--json` prints one JSON object. An error ends with what to type next. `afina mcp` offers plan, runs, show and advise as tools.
"""


def text() -> str:
    """Return llms.txt."""
    pages = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = "\n".join(f"- `afina {name}`: {one.help}" for name, one in COMMANDS.items())
    links = "\n".join(f"- [{name}]({path}): {about}" for name, path, about in pages)
    guide = "- [README](README.md): installing, a first run, Python\n- [guide](docs/guide/en/index.md): fine-tuning without mathematics\n- [guía](docs/guide/es/index.md): lo mismo en español"
    return f"{HEAD}\n## Commands\n\n{commands}\n\n## Pages\n\n{guide}\n{links}\n"


if __name__ == "__main__":
    (ROOT / "llms.txt").write_text(text(), encoding="utf-8")
