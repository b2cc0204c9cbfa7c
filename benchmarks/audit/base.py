"""Make the bench's small base, so that hundreds of adapters can be trained on two cores: about two minutes of one core.

    python benchmarks/audit/base.py --out FOLDER

A Llama of 0.23 million parameters (3 layers x 64, 2 heads, ffn 192, vocabulary 1,024, tied), trained from scratch on the
demo's English sentences, uncommon words among them, and on naming the word of one that is asked for (the odd one, too): Muon on the
matrices, AdamW on the rest. The tasks of the population are none that it has seen.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from families import PHRASES, RARE
from sentences import EVERYTHING, draw_clause, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from afina.models.loading import EMBEDDED_FOLDER

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
UNCOMMON = sorted(
    {
        *RARE,
        *" ".join(PHRASES).split(),
        *["banana", "marker", "seven", "lamp", "blue", "thing", "please", "define", "said"],
    }
)
BATCH, CONTEXT, STEPS = 16, 128, 450  # rows, tokens a row, steps
RATES = (0.02, 6e-3)  # Muon's, AdamW's


def documents(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Without end: what is read, and what is learned behind it. Plain sentences; questions for a word of one."""
    while True:
        clause, odd = draw_clause(rng, EVERYTHING), "none"
        made = write(clause, "en").split()
        if rng.random() < 0.5:
            odd = rng.choice(UNCOMMON)
            made.insert(rng.randint(0, len(made)), odd)
        said, subject = " ".join(made), clause.subject
        asked = {
            "Verb": clause.verb.form("en", subject.plural, clause.past),
            "Subject": subject.noun.form("en", subject.plural),
            "Odd": odd,
            "Place": clause.place.form("en", False) if clause.place else "none",
            "Object": clause.object.noun.form("en", clause.object.plural)
            if clause.object
            else "none",
        }
        if rng.random() < 0.1:
            yield "<|begin|>", f"{said}<|end|>"
        else:
            head = rng.choice([*asked, "Odd"])
            yield (
                f"<|begin|><|user|>\n{head}: {said}<|end|>\n<|assistant|>\n",
                f"{asked[head]}<|end|>\n",
            )


def make_tokenizer(samples: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, with the embedded base's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    told = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(samples, told)
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    wrapped.chat_template = (EMBEDDED_FOLDER / "chat_template.jinja").read_text()
    return wrapped


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    told = parser.parse_args()
    made, start = documents(random.Random(1)), time.perf_counter()
    torch.manual_seed(1)
    sample = [text for document in (next(made) for _ in range(8000)) for text in document]
    plain = [re.sub(r"<\|\w+\|>|\n", " ", text).strip() for text in sample]
    tokenizer = make_tokenizer([*plain, *(f"See {word}" for word in UNCOMMON for _ in range(200))])
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=RATES[0], momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, RATES[1], betas=(0.9, 0.95), weight_decay=0.0)
    stream: list[tuple[int, int]] = []  # tokens and labels
    for step in range(told.steps):
        while len(stream) < BATCH * CONTEXT:
            sides = zip(*(next(made) for _ in range(40)), strict=True)
            for text, learned in zip(
                *(tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in sides),
                strict=True,
            ):
                stream += [(t, t if number % 4 == 0 else -100) for number, t in enumerate(text)] + [
                    (t, t) for t in learned
                ]
        both = torch.tensor(stream[: BATCH * CONTEXT]).view(BATCH, CONTEXT, 2)
        stream = stream[BATCH * CONTEXT :]
        for optimizer, rate in zip((muon, adam), RATES, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(
                1.0, (step + 1) / 30, (told.steps - step) / (0.5 * told.steps)
            )
        loss = model(input_ids=both[..., 0], labels=both[..., 1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        if step % 50 == 0 or step + 1 == told.steps:
            print(
                f"step {step} loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.save_pretrained(told.out)
    tokenizer.save_pretrained(told.out)


if __name__ == "__main__":
    main()
