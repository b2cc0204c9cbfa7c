"""Schemas: the kinds of rows that a file can hold, by name.

A schema of another package is registered by an entry point of the group `afina.row_schemas`.
"""

from afina.data.schemas.base import ROW_SCHEMAS, Schema, register_schema
from afina.data.schemas.embedding import SCORED, EmbeddingRow, EmbeddingSchema
from afina.data.schemas.labeled import (
    CLASSES,
    MULTI_LABEL,
    PICTURES,
    REGRESSION,
    LabeledRow,
    LabeledSchema,
    class_names,
    task_of,
)
from afina.data.schemas.messages import Message, Prompt, prompt_key, text_of
from afina.data.schemas.preference import (
    LABELS,
    PAIRS,
    PreferenceRow,
    PreferenceSchema,
    split_pairs,
)
from afina.data.schemas.prompt import PromptRow, PromptSchema
from afina.data.schemas.relevance import RelevanceSchema
from afina.data.schemas.sft import SFTRow, SFTSchema
from afina.data.schemas.tagged import TaggedRow, TaggedSchema

__all__ = [
    "CLASSES",
    "EMBEDDING",
    "LABELED",
    "LABELS",
    "MULTI_LABEL",
    "PAIRS",
    "PICTURES",
    "PREFERENCE",
    "PROMPT",
    "REGRESSION",
    "RELEVANCE",
    "ROW_SCHEMAS",
    "SCORED",
    "SFT",
    "TAGGED",
    "EmbeddingRow",
    "LabeledRow",
    "Message",
    "PreferenceRow",
    "Prompt",
    "PromptRow",
    "SFTRow",
    "Schema",
    "TaggedRow",
    "class_names",
    "prompt_key",
    "register_schema",
    "split_pairs",
    "task_of",
    "text_of",
]

SFT, LABELED, PREFERENCE, PROMPT = SFTSchema(), LabeledSchema(), PreferenceSchema(), PromptSchema()
EMBEDDING, RELEVANCE, TAGGED = EmbeddingSchema(), RelevanceSchema(), TaggedSchema()
