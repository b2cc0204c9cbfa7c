"""Measure the embedded base and write its model card: python recipes/embedded_base/card.py [FOLDER]

Held-out perplexity per language, 50 chat prompts (do they stop by themselves?), and how often it copies exactly.
"""

import json
import math
import random
import sys
from pathlib import Path

import text as source

from afina.data import RETENTION_TEXT
from afina.data.renderer import Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.models.loading import EMBEDDED_FOLDER, load_base
from afina.objectives.language_data import tokenize_rows
from afina.objectives.language_modeling import mean_loss

CARD = """---
license: apache-2.0
language: [en, es]
tags: [afina, llama]
---

# The embedded base of afina

A very small language model that comes with afina, so that everything can be tried offline. It reads and writes simple
sentences in English and Spanish and follows the chat template for a handful of skills: repeat, translate, plural, past,
answer who/what/where, tell a tiny story, greet. It knows nothing of the world. Do not use it for anything but trying afina.

| | |
|---|---|
| shape | Llama, 6 layers x 256, 4 heads, 2 KV heads, feed-forward 640, vocabulary 4,096 (byte-level BPE, digits single), tied; 5.2 million parameters, bfloat16 |
| trained on | {tokens:,} tokens in two stages: {mixes}; about an hour and a half on 2 CPU cores that were doing other work too |
| text | tiny Shakespeare and Don Quijote (public domain; every 50th passage held out), and stories and chats made by the recipe from a lexicon of its own |
| recipe | recipes/embedded_base in afina's repository |
| licence | Apache-2.0, like afina |

## Measured ({date}, bfloat16)

| | |
|---|---|
| perplexity a token on held-out Shakespeare (English, 1600) | {english:.1f} |
| perplexity a token on held-out Don Quijote (Spanish, 1605) | {spanish:.1f} |
| perplexity a token on simple sentences, English | {simple_en:.2f} |
| perplexity a token on simple sentences, Spanish | {simple_es:.2f} |
| chat prompts that it ends by itself | {stopped} of {asked} |
| sentences repeated exactly | {copied:.0f}% |
| sentences translated exactly | {translated:.0f}% |
"""


def perplexity(base, renderer, texts: list[str], file: Path) -> float:
    file.write_text("\n\n\n".join(texts) + "\n")
    return math.exp(
        mean_loss(
            base, tokenize_rows("pretrain", renderer, read_table(file, SFT).rows, None), 2048, None
        )
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED_FOLDER
    base = load_base(str(folder))
    plain, chats = Renderer(base.tokenizer, "plain", 512), Renderer(base.tokenizer, None, 512)
    scratch = Path("/tmp/afina-card.txt")
    general = [p for p in RETENTION_TEXT.read_text().split("\n\n\n") if p.strip()]
    accents = lambda text: sum(c in "áéíóúñ¿¡" for c in text) / len(text)
    spanish, english = (
        [p for p in general if accents(p) > 0.004],
        [p for p in general if accents(p) <= 0.004],
    )
    rng = random.Random(12345)
    simple = {
        language: [source.st.Story.draw(rng, 4).write(language) for _ in range(150)]
        for language in ("en", "es")
    }
    turns = []
    while len(turns) < 50:
        chat = source.chat(rng, "copy")
        turns.append(
            [{"role": role, "content": content} for role, content in chat if role != "system"][:1]
        )
    answers = generate_completions(
        base,
        [chats.prompt(turn) for turn in turns],
        SamplingParams(200),
        stop_token_ids=chats.stop_token_ids,
    )
    exact = {}
    for name, skill in (("copied", source._copy), ("translated", source._translate)):
        asked = [skill(rng, language) for language in ("en", "es") * 100]
        said = generate_completions(
            base,
            [chats.prompt(chat[0][1]) for chat in asked],
            SamplingParams(80),
            stop_token_ids=chats.stop_token_ids,
        )
        exact[name] = 100 * sum(a.text == chat[1][1] for a, chat in zip(said, asked)) / len(asked)
    stages = json.loads((folder / "training.json").read_text())
    import datetime

    card = CARD.format(
        tokens=sum(stage["tokens"] for stage in stages),
        mixes=", ".join(f"{stage['steps']} steps of mix '{stage['mix']}'" for stage in stages),
        date=datetime.date.today(),
        english=perplexity(base, plain, english, scratch),
        spanish=perplexity(base, plain, spanish, scratch),
        simple_en=perplexity(base, plain, simple["en"], scratch),
        simple_es=perplexity(base, plain, simple["es"], scratch),
        stopped=sum(a.ended_by_stop for a in answers),
        asked=len(answers),
        **exact,
    )
    (folder / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
