"""`afina generate`: complete prompts, or classify them where the base is a classifier."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun, load_run
from afina.data.images import read_image
from afina.data.renderer import Renderer
from afina.data.schemas import EMBEDDING, TaggedRow
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.errors import SettingsError
from afina.evaluation.results import GenerateResult
from afina.models.classifier import TAGS_TASK, Classifier
from afina.models.encoder import Encoder
from afina.objectives.embedding import default_length
from afina.objectives.entity_scores import are_entity_tags, find_entities
from afina.objectives.label_tasks import LabelTask
from afina.objectives.labeled_data import encode_input
from afina.objectives.prepared import recorded_eval_rows
from afina.objectives.tagging import TaggingObjective, tokenize_tagged_rows
from afina.settings import GenerateSettings, as_settings


def generate(prompts: Sequence[str] | GenerateSettings, **values: Any) -> GenerateResult:
    """Complete prompts with an adapter or without.

    Returns:
        `{"base", "adapter", "answers": [{"prompt", "text", "tokens", "stopped"}]}`. A classifier
        gives `{"prompt", "text", "share"}`: the class and its probability (0 to 1); prompts of an
        image classifier are files.

    Example:
        >>> afina.generate(["The movie was"], adapter="runs/reviews")["answers"][0]["text"]
    """
    settings = as_settings(GenerateSettings, prompts, "prompts", values)
    opened = load_run(settings.adapter, settings, adapter=not settings.disable_adapter)
    texts = [
        line
        for p in settings.prompts
        for line in (sys.stdin.read().splitlines() if p == "-" else [p])
        if line
    ]
    return GenerateResult(
        base=opened.base.name,
        adapter=str(settings.adapter) if opened.active else None,
        answers=_answers(opened, texts, settings),
    )


def _answers(
    opened: LoadedRun, texts: Sequence[str], settings: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the result for each text, by the kind of the base."""
    if not texts:
        return []
    if isinstance(opened.base, Encoder):
        return _embed(opened.base, opened.active, texts, Path(str(settings.adapter)))
    if isinstance(opened.base, Classifier) and opened.base.task == TAGS_TASK:
        return _tag(opened.base, opened.active, texts)
    if isinstance(opened.base, Classifier) and opened.base.labels:
        has_pairs = bool(((opened.run or {}).get("data") or {}).get("pairs"))
        return _label(opened.base, opened.active, texts, has_pairs)
    return _complete(opened, texts, settings)


def _complete(
    opened: LoadedRun, texts: Sequence[str], settings: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the completion of each text."""
    base = opened.causal_lm
    renderer = Renderer(
        base.tokenizer,
        "plain" if settings.ignore_chat_template else opened.chat_format,
        base.max_positions,
    )
    sampling = SamplingParams(
        settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed
    )
    completions = generate_completions(
        base,
        [renderer.prompt(text) for text in texts],
        sampling,
        opened.active,
        renderer.stop_token_ids,
    )
    return [
        {
            "prompt": prompt,
            "text": completion.text,
            "tokens": len(completion.token_ids),
            "stopped": completion.ended_by_stop,
        }
        for prompt, completion in zip(texts, completions, strict=True)
    ]


@torch.no_grad()
def _label(
    base: Classifier, active: ActiveAdapters, prompts: Sequence[str], has_pairs: bool
) -> list[dict[str, Any]]:
    """Return what each text, pair of texts or image is classified as, one at a time."""
    answers = []
    for prompt in prompts:
        content = prompt if base.images is None else read_image(Path(prompt))
        pair = None
        if has_pairs and isinstance(content, str):
            content, pair = _split_pair(content)
        tokens = encode_input(base, content, base.max_positions, prompt, pair)
        with base.forward_context.use(active.row_segments()):
            rows = base.batch([tokens])
            text, share = LabelTask(base.task, base.labels).answer(base.logits(rows)[0])
        known = {} if share is None else {"share": share}
        answers.append({"prompt": prompt, "text": text} | known)
    return answers


@torch.no_grad()
def _tag(base: Classifier, active: ActiveAdapters, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entities of each text, or the tag of each word where tags are no entities."""
    has_entities, answers = are_entity_tags(base.labels), []
    split = [re.findall(r"\w+|[^\w\s]", prompt) for prompt in prompts]
    tagged = [
        TaggedRow(prompt[:40], tuple(words), (base.labels[0],) * len(words))
        for prompt, words in zip(prompts, split, strict=True)
    ]
    rows = tokenize_tagged_rows(base, tagged, base.max_positions, None)
    objective = TaggingObjective(base, rows, rows, base.max_positions, 1, 0)
    found = objective.predictions(rows, active)
    for prompt, words, tags in zip(prompts, split, found, strict=True):
        entities = [
            {"type": one.type, "text": " ".join(words[one.start : one.end])}
            for one in find_entities(tags)
        ]
        named = [f"{one['text']} ({one['type']})" for one in entities]
        text = ", ".join(named) or "none"
        if not has_entities:
            text = " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
        answers.append({"prompt": prompt, "text": text, "words": words, "tags": list(tags)})
        answers[-1] |= {"entities": entities} if has_entities else {}
    return answers


@torch.no_grad()
def _embed(
    base: Encoder, active: ActiveAdapters, prompts: Sequence[str], run: Path
) -> list[dict[str, Any]]:
    """Return the vector of each text, and the nearest other text among the eval rows of the run."""
    length = default_length(base)

    def vectors(texts: Sequence[str]) -> torch.Tensor:
        with base.forward_context.use(active.row_segments()):
            parts = [
                base.embed(base.batch([encode_input(base, t, length, t[:40]) for t in some]))
                for some in (texts[at : at + 16] for at in range(0, len(texts), 16))
            ]
        return torch.cat(parts)

    file = recorded_eval_rows(run)
    rows = read_table(file, EMBEDDING).rows if file.is_file() else []
    known = list(dict.fromkeys(t for row in rows for t in (*row.positives, *row.negatives)))
    found = vectors(prompts)
    answers: list[dict[str, Any]] = []
    units = F.normalize(vectors(known), dim=-1) if known else None
    for prompt, vector in zip(prompts, found, strict=True):
        near: dict[str, Any] = {"text": ", ".join(f"{x:.4f}" for x in vector.tolist())}
        if units is not None:
            cosines = units @ F.normalize(vector, dim=0)
            best = int(cosines.argmax())
            near = {"text": known[best], "similarity": float(cosines[best])}
        answers.append({"prompt": prompt} | near | {"embedding": vector.tolist()})
    return answers


def _split_pair(prompt: str) -> tuple[str, str]:
    """Return the two texts of a prompt for a run of pairs; raises `SettingsError`."""
    first, tab, second = prompt.partition("\t")
    if not (tab and first.strip() and second.strip()):
        raise SettingsError(
            "this adapter reads pairs of texts",
            where="prompts",
            why=f"found one text: {prompt[:60]!r}",
            hint="put a tab between the two: $'first text\\tsecond text'",
        )
    return first, second
