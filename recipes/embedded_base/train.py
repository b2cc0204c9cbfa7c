r"""Make the embedded base: tokenizer, chat template, weights, card. About an hour on 2 CPU cores.

    python recipes/embedded_base/train.py --shakespeare input.txt --quijote quijote.txt --out FIRST
    python recipes/embedded_base/train.py --shakespeare input.txt --quijote quijote.txt --out OUT \
        --start FIRST --mix copy --steps 600

A Llama of 5.2 million parameters (6 layers x 256, 4 heads, 2 KV heads, ffn 640, vocabulary 4,096, tied), trained
from scratch: Muon on the matrices, AdamW on embeddings and norms, bf16 products over float32 masters (1.5 times
the tokens a second of autocast here), trapezoidal schedule. Texts: see
text.py. Held out: every 50th passage of each book, and stories and chats drawn from another seed.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import text as source
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BATCH, CONTEXT = 16, 512  # rows x tokens a step


def make_tokenizer(samples: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens; digits are single tokens, so that numbers are spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=2048,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def render(tokenizer: PreTrainedTokenizerFast, document: str | source.Chat) -> str:
    """A document as the model reads it, from <|begin|> to <|end|>."""
    if isinstance(document, str):
        return f"<|begin|>{document}<|end|>"
    return tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in document], tokenize=False
    )


def schedule(step: int, steps: int) -> float:
    """Trapezoid: 3% warm-up, flat, the last 40% down to zero."""
    return min(1.0, (step + 1) / (0.03 * steps), (steps - step) / (0.4 * steps))


def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean loss in nats a token over `tokens` (1-D), in windows of the context."""
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=r, labels=r).loss.item() for r in rows.split(8)]
    return sum(losses) / len(losses)


def main() -> None:
    """Parse the flags, train, save and print the card's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shakespeare", type=Path, required=True)
    parser.add_argument("--quijote", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument(
        "--start", type=Path, help="go on from this folder instead of from random weights"
    )
    parser.add_argument(
        "--mix", choices=source.SKILLS, default="first", help="which skills the made text practises"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    english, spanish = source.books(args.shakespeare, args.quijote)
    held = {"English book": english[::50], "Spanish book": spanish[::50]}
    books = [p for i, p in enumerate(english) if i % 50] + [
        p for i, p in enumerate(spanish) if i % 50
    ]
    made = source.documents(rng, args.mix)
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
    else:
        samples = [next(made) for _ in range(12000)]
        plain = [d if isinstance(d, str) else " ".join(t for _, t in d) for d in samples]
        tokenizer = make_tokenizer(plain + books)
    encode = lambda documents: tokenizer(
        "\n".join(render(tokenizer, d) for d in documents), add_special_tokens=False
    )["input_ids"]

    other = source.documents(random.Random(args.seed + 1), args.mix)
    held["stories and chats"] = [next(other) for _ in range(1500)]
    held_tokens = {name: torch.tensor(encode(documents)) for name, documents in held.items()}
    book_tokens = [encode([p]) for p in books]
    print(
        "book tokens",
        sum(map(len, book_tokens)),
        {k: len(v) for k, v in held_tokens.items()},
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rms_norm_eps=1e-5,
    )
    model = (
        LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        if args.start
        else LlamaForCausalLM(config)
    )
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    matrices = [p for n, p in masters.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in masters.items() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=0.01, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    base_rates = [
        (g, g["lr"] * (0.6 if args.start else 1.0)) for o in (muon, adam) for g in o.param_groups
    ]
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)

    stream: list[int] = []
    order: list[int] = []
    start = time.time()
    for step in range(args.steps):
        while (
            len(stream) < BATCH * CONTEXT + 1
        ):  # about 45% books, 55% made text, by tokens; fewer books in the copy mix
            if not order:
                order = random.Random(rng.random()).sample(range(len(books)), len(books))
            if rng.random() < (0.07 if args.mix == "first" else 0.035):
                stream += book_tokens[order.pop()]
            else:
                stream += encode([next(made) for _ in range(2)])
        tokens = torch.tensor(stream[: BATCH * CONTEXT]).view(BATCH, CONTEXT)
        stream = stream[BATCH * CONTEXT :]
        for group, rate in base_rates:
            group["lr"] = rate * schedule(step, args.steps)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for name, p in model.named_parameters():
            masters[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        muon.step()
        adam.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        if step % 25 == 0:
            print(
                f"step {step} loss {loss.item():.3f} {(step + 1) * BATCH * CONTEXT / (time.time() - start):.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 300 == 0 or step + 1 == args.steps:
            model.eval()
            card = {
                name: math.exp(held_out_loss(model, tokens)) for name, tokens in held_tokens.items()
            }
            model.train()
            print("held-out perplexity", {k: round(v, 2) for k, v in card.items()}, flush=True)
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
            seconds = round(time.time() - start)
            done = (step + 1) * BATCH * CONTEXT
            facts = {
                "mix": args.mix,
                "seed": args.seed,
                "steps": step + 1,
                "tokens": done,
                "seconds": seconds,
                "perplexity": card,
            }
            before = json.loads((args.start / "training.json").read_text()) if args.start else []
            (args.out / "training.json").write_text(json.dumps([*before, facts], indent=1) + "\n")


if __name__ == "__main__":
    main()
