"""What the name of a column means, in English and Spanish: "respuesta_agente" is an answer.

The last word of an English name says what it is, and the first word of a Spanish one:
`customer_text`, `texto_cliente`.
"""

import re
import unicodedata
from functools import cache
from typing import Any

ANSWER, PROMPT, CONTEXT, SYSTEM, TEXT = "answer", "prompt", "context", "system", "text"
LABEL, SCORE, CHOSEN, REJECTED = "label", "score", "chosen", "rejected"
REASONING, TOOLS, WEIGHT, MEDIA, TOKENS = "reasoning", "tools", "weight", "media", "tokens"
NONE, UNKNOWN = "none", "unknown"  # without a meaning for training; a name that says nothing

_WORDS = {
    ANSWER: "answer response reply output completion target solution summary translation "
    "generation correction rewrite paraphrase gold truth highlight assistant bot gpt chatgpt ai "
    "headline simplification respuesta contestacion replica salida solucion resumen traduccion "
    "correccion objetivo asistente reescritura",
    PROMPT: "prompt question instruction query input request ask problem task user human "
    "utterance dialogue dialog source original pregunta consulta instruccion entrada peticion "
    "problema tarea usuario humano enunciado solicitud dialogo q",
    CONTEXT: "context passage background evidence document article paragraph snippet contexto "
    "pasaje documento articulo parrafo evidencia fondo antecedente",
    SYSTEM: "system sys persona sistema",
    TEXT: "text sentence content body message review comment tweet post email mail description "
    "abstract story premise hypothesis phrase complaint feedback transcript note subject title "
    "texto frase oracion contenido cuerpo mensaje resena opinion comentario correo descripcion "
    "historia premisa hipotesis queja relato nota asunto titulo cita quote poem poema lyric letra",
    LABEL: "label class category intent sentiment emotion topic tag genre polarity department "
    "team priority type kind status verdict decision language stance toxicity toxic spam "
    "hate etiqueta clase categoria intencion sentimiento emocion tema genero polaridad departamento "
    "equipo prioridad tipo estado veredicto idioma rating star estrella valoracion grade severity "
    "urgency mood ner kto gravedad urgencia entailment",
    SCORE: "similarity similitud relevance relevancia",
    CHOSEN: "chosen preferred better winner accepted best good elegida elegido preferida preferido "
    "mejor buena ganadora aceptada win",
    REJECTED: "rejected dispreferred worse loser worst bad rechazada rechazado peor mala perdedora "
    "lose",
    REASONING: "reasoning thinking thought thoughts rationale cot chain explanation razonamiento "
    "pensamiento explicacion justificacion",
    TOOLS: "tool function call herramienta funcion llamada",
    WEIGHT: "weight peso train trainable mask",
    MEDIA: "image picture photo img audio video imagen foto pixel speech",
    TOKENS: "ids token",
}
_NO_MEANING = (
    "id idx index uid uuid guid key hash sha md5 url uri link href path file filename filepath line "
    "row date time timestamp created updated at year month day version revision split fold set "
    "subset license author name first last lang locale num number count len length size total "
    "score difficulty quality model generator engine temperature meta metadata domain origin "
    "dataset corpus provider annotator worker price amount position start end offset page rank "
    "seed step batch turns level country city place region zip phone username login device "
    "browser ip user_id views votes likes upvotes shares probability prob confidence percent age "
    "identificador indice clave enlace ruta archivo fecha hora creado actualizado ano mes dia "
    "licencia autor nombre apellido numero cantidad longitud puntuacion puntaje dificultad calidad "
    "modelo dominio origen fuente pais ciudad telefono precio pagina edad n no nr nro customer "
    "client agent cliente agente vendedor seller buyer product producto item sku brand marca order "
    "pedido ticket case caso channel canal store tienda by"
)
_FIRST_WITHOUT_MEANING = (
    "id idx num n no nr nro count is has fecha hora numero identificador indice score puntuacion "
    "url link enlace date time created length len nombre row line"
)
_WHOLE_NAMES = {  # names that mean something else than their words
    "parallel_tool_calls": NONE,
    "input_ids": TOKENS,
    "attention_mask": TOKENS,
    "token_type_ids": TOKENS,
    "label_ids": TOKENS,
    "src": PROMPT,
    "tgt": ANSWER,
    "ref": ANSWER,
    "reference": ANSWER,
    "ground_truth": ANSWER,
    "images": MEDIA,
    "a": UNKNOWN,
    "p": UNKNOWN,
    "source": NONE,
    "original": NONE,
    "end_user": NONE,
    "class_id": LABEL,
    "label_id": LABEL,
    "score": SCORE,
    "puntuacion": SCORE,
    "language_model": NONE,
    "set": NONE,
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
_NOTHING = frozenset(_NO_MEANING.split())
_NOTHING_FIRST = frozenset(_FIRST_WITHOUT_MEANING.split())
# a word of a weak role only says that there is text, or a person: other words of a name decide
_WEAK = (TEXT, PROMPT, CONTEXT)


@cache
def split_name(name: str) -> tuple[str, ...]:
    """Return the words of a column's name: lower case, without accents and plural endings."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", plain)
    return tuple(_singular(word) for word in re.findall(r"[a-z]+|\d+", plain.lower()))


def _singular(word: str) -> str:
    if word in _ROLES or word in _NOTHING:
        return word
    for ending in ("es", "s"):
        stem = word.removesuffix(ending)
        if stem != word and (stem in _ROLES or stem in _NOTHING):
            return stem
    stem = word.removesuffix("ies") + "y"
    return stem if word.endswith("ies") and stem in _ROLES else word


@cache
def meaning_of(name: str) -> str:
    """Return what a column's name means: one of the words above; `UNKNOWN` where it says nothing.

    Raises nothing: the values of the column have to confirm what its name promises.
    """
    words = split_name(name)
    whole = _WHOLE_NAMES.get("_".join(words)) or _WHOLE_NAMES.get(name.lower())
    if whole is not None:
        return whole
    if not words:
        return UNKNOWN
    named = [word for word in words if not word.isdigit()]
    if not named:
        return UNKNOWN
    if len(named) > 1 and (named[-1] in _NOTHING or named[0] in _NOTHING_FIRST):
        strong = [_ROLES[w] for w in named[:-1] if _ROLES.get(w, TEXT) not in _WEAK]
        if named[-1] in ("name", "nombre") and _ROLES.get(named[0]) == LABEL:
            return LABEL
        person = named[-1] in ("customer", "client", "agent", "cliente", "agente")
        weak = [_ROLES[w] for w in named[:-1] if w in _ROLES]
        return next(iter(strong or weak), NONE) if person else NONE
    roles = [_ROLES[word] for word in reversed(named) if word in _ROLES]
    strong_roles = [role for role in roles if role not in _WEAK]
    for first in (SYSTEM, CHOSEN, REJECTED, REASONING):  # whatever else the name says
        if first in strong_roles:
            return first
    if strong_roles:
        return strong_roles[0]
    if roles:
        return next((role for role in roles if role != TEXT), TEXT)
    return NONE if any(word in _NOTHING for word in named) else UNKNOWN


MEANINGS = {
    TOOLS: "tools or calls of them",
    REASONING: "reasoning before an answer",
    WEIGHT: "a weight or a mask of the loss",
    MEDIA: "pictures or sound",
    TOKENS: "token ids",
    SYSTEM: "a system message",
    CHOSEN: "a better answer",
    REJECTED: "a worse answer",
    ANSWER: "an answer",
    PROMPT: "a prompt",
    CONTEXT: "a part of a prompt",
    TEXT: "a second text",
}
LABEL_NAMES = {"label", "labels", "kto_tag"}
WORDED = {ANSWER, PROMPT, CONTEXT, TEXT}  # names that also occur for short remarks
NEUTRAL = {1, "1", "1.0", "true"}  # a weight or mask under which all is trained alike


_EMPTY_JSON = ("[]", "{}", "null")  # cells of a table without tools


def refused_meaning(name: str, value: Any) -> str | None:
    """Return what a column means that must not stay unread; None where it may."""
    last = name.rpartition(".")[2]
    role = meaning_of(last)
    if last.lower() in LABEL_NAMES:
        return "a label"
    if role == WEIGHT and (isinstance(value, (dict, list)) or value not in NEUTRAL):
        return MEANINGS[WEIGHT]
    if role == WEIGHT or role not in MEANINGS or value in _EMPTY_JSON:
        return None
    if role in WORDED and not _has_words(value):
        return None
    if isinstance(value, (bool, int, float)):
        return None
    return MEANINGS[role]


def _has_words(value: Any) -> bool:
    """Whether some text in a value has several words."""
    if isinstance(value, dict):
        return any(map(_has_words, value.values()))
    if isinstance(value, list):
        return any(map(_has_words, value))
    return isinstance(value, str) and " " in value.strip()
