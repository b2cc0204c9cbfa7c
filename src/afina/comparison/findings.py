"""What others have measured, and we advise by. Each finding is theirs; the figures are copied from where it says.

Beside it stands what our reference study says to the same claim (study.json, written by studies/study.py), whether it
agrees or not: it was measured on one small base, they measured on large ones.
"""

import json
from functools import cache
from pathlib import Path

STUDIED = {
    "regret": "as-good",
    "learns_less": "learns-less",
    "mora_facts": "mora-facts",
    "qlora": "four-bits",
}  # saying: claim

FINDINGS: dict[str, tuple[str, str]] = {  # name: (who, where)
    "regret": (
        "Schulman et al., LoRA Without Regret, 2025",
        "https://thinkingmachines.ai/blog/lora/",
    ),
    "learns_less": (
        "Biderman et al., LoRA Learns Less and Forgets Less, 2024",
        "https://arxiv.org/abs/2405.09673",
    ),
    "lima": (
        "Zhou et al., LIMA: Less Is More for Alignment, 2023",
        "https://arxiv.org/abs/2305.11206",
    ),
    "mora": ("Jiang et al., MoRA, 2024", "https://arxiv.org/abs/2405.12130"),
    "qlora": ("Dettmers et al., QLoRA, 2023", "https://arxiv.org/abs/2305.14314"),
    "alora": ("Greenewald et al., Activated LoRA, 2025", "https://arxiv.org/abs/2504.12397"),
    "slora": ("Sheng et al., S-LoRA, 2023", "https://arxiv.org/abs/2311.03285"),
    "dpo": (
        "Rafailov et al., Direct Preference Optimization, 2023",
        "https://arxiv.org/abs/2305.18290",
    ),
    "retrieval": (
        "Ovadia et al., Fine-Tuning or Retrieval?, 2023",
        "https://arxiv.org/abs/2312.05934",
    ),
    "hallucinate": (
        "Gekhman et al., Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?, 2024",
        "https://arxiv.org/abs/2405.05904",
    ),
    "fewshot": (
        "Brown et al., Language Models are Few-Shot Learners, 2020",
        "https://arxiv.org/abs/2005.14165",
    ),
}

SAYINGS: dict[str, dict[str, str]] = {
    "en": {
        "retrieval": "Give the model the facts in its prompt, looked up for each question (retrieval): that beat fine-tuning at "
        "questions about facts, old and new ones. What changes would have to be trained again each time.",
        "also_retrieval": "Try retrieval beside it: where the facts can be looked up, it answered better than fine-tuning did.",
        "hallucinate": "Facts that the base does not know are learned late, and the more of them a model has learned, the more "
        "it makes up: hold out questions about old facts too.",
        "fewshot": "With {rows} examples, put them into the prompt first: large models learn from a few examples there, and it costs "
        "nothing to try. Fine-tune when that is not enough, with a hundred examples or more.",
        "few_texts": "So little ({rows}) fits into the prompt, whole or looked up for each question (retrieval): that beat fine-tuning "
        "at questions about facts, and costs nothing to try.",
        "only_pairs": "There are pairs and no answers to learn first: DPO learns from the pairs directly. It moves what the base can "
        "already say; what it cannot say at all needs answers first.",
        "no_rows": "There is nothing to learn from yet. Write the best prompt you can, and collect its answers, corrected, as rows.",
        "lima": "Style and form are learned from few, careful examples: 1,000 chosen ones made a good assistant there.",
        "regret": "A LoRA on all linear layers learns as much as full fine-tuning as long as the data does not exceed what it can hold, "
        "at about ten times full fine-tuning's learning rate, and at about two thirds of the compute.",
        "learns_less": "Where there is much to learn (a field's texts, code, mathematics), LoRA stayed below full fine-tuning, and forgot "
        "less of the rest.",
        "mora_facts": "At memorising pairs with equal parameters (rank 8), MoRA knew all characters after 900 steps, LoRA 54%; "
        "full fine-tuning 100%.",
        "mora_domain": "In continued pretraining at rank 256, MoRA came to 55.4 on biomedical questions, LoRA to 54.1, full fine-tuning to "
        "56.4.",
        "qlora": "The base in plain storage does not fit ({need}, of {room}); in 4 bits it does. With NF4 the published results "
        "matched 16 bits.",
        "full_too_large": "Full fine-tuning would need {need}, of {room}.",
        "nothing_fits": "No method fits in {room}: the smallest needs {need}. A smaller base, shorter rows or a larger machine.",
        "dpo": "There are pairs: learning from them directly (DPO) does what a reward model and reinforcement learning do, more simply. "
        "Teach the answers first, then go on from that run with the pairs.",
        "collect_pairs": "What it should rather say is learned best from pairs of a better and a worse answer: collect some with "
        "`afina prefer`, and go on from this run with --objective dpo.",
        "slora": "One base served thousands of adapters at nearly the speed of one. Plain LoRA of small rank is what other servers read "
        "too; vLLM reads neither DoRA nor MoRA.",
        "alora": "An activated LoRA acts only from its invocation on, so that what was read before need not be read again: switching was "
        "20 to 30 times quicker there. They took rank 32.",
        "earlier_same": "Your comparison {name} on this base: {figures}. It does not speak against this.",
        "earlier_none": "Your comparison {name} on this base found no method better than the base alone: with such data, leave it as it "
        "is, or bring more rows.",
        "earlier_better": "Your comparison {name} on this base showed {better} to be better than {worse} ({figures}): it goes before "
        "what others measured.",
        "study_confirmed": "Our own study on the small embedded base agrees: {figures}.",
        "study_not_confirmed": "Our own study on the small embedded base did not show it: {figures}. The finding is about larger "
        "ones; `afina compare` tells for yours.",
        "study_depends": "In our own study on the small embedded base it depends: {figures}.",
        "no_plan": "Memory and time are not known: {why}",
        "title": "Advice",
        "use": "use",
        "prompt": "a prompt with examples, no training",
        "find": "retrieval, no training",
        "none": "none: nothing fits",
        "settings": "settings",
        "machine": "this machine",
        "told": "room",
        "memory": "peak memory",
        "step": "a step",
        "command": "type",
        "then": "then",
        "source": "after",
    },
    "es": {
        "retrieval": "Da al modelo los hechos en la pregunta, buscados cada vez (recuperación): en preguntas sobre hechos, viejos y nuevos, "
        "eso superó al ajuste fino. Lo que cambia habría que entrenarlo de nuevo cada vez.",
        "also_retrieval": "Prueba también la recuperación: donde los hechos se pueden buscar, respondió mejor que el ajuste fino.",
        "hallucinate": "Los hechos que la base no conoce se aprenden tarde, y cuantos más ha aprendido un modelo, más inventa: reserva "
        "también preguntas sobre hechos viejos.",
        "fewshot": "Con {rows} ejemplos, ponlos primero en la pregunta: los modelos grandes aprenden ahí de unos pocos, y probarlo no "
        "cuesta nada. Ajusta el modelo cuando eso no baste, con cien ejemplos o más.",
        "few_texts": "Tan poco ({rows}) cabe en la pregunta, entero o buscado para cada una (recuperación): eso venció al ajuste fino "
        "en preguntas sobre hechos, y probarlo no cuesta nada.",
        "only_pairs": "Hay pares y ninguna respuesta que aprender antes: DPO aprende de los pares directamente. Mueve lo que la base ya "
        "sabe decir; lo que no sabe decir necesita respuestas primero.",
        "no_rows": "Aún no hay de qué aprender. Escribe la mejor pregunta que puedas y junta sus respuestas, corregidas, como filas.",
        "lima": "El estilo y la forma se aprenden de pocos ejemplos cuidados: allí, 1.000 escogidos hicieron un buen asistente.",
        "regret": "Un LoRA en todas las capas lineales aprende tanto como el ajuste completo mientras los datos no excedan lo que cabe en él, "
        "con unas diez veces la tasa de aprendizaje del ajuste completo y unos dos tercios del cómputo.",
        "learns_less": "Donde hay mucho que aprender (los textos de un campo, código, matemáticas), LoRA quedó por debajo del ajuste "
        "completo, y olvidó menos de lo demás.",
        "mora_facts": "Al memorizar pares con los mismos parámetros (rango 8), MoRA sabía todos los caracteres tras 900 pasos, LoRA el 54 %; "
        "el ajuste completo, el 100 %.",
        "mora_domain": "En preentrenamiento continuado con rango 256, MoRA llegó a 55,4 en preguntas biomédicas, LoRA a 54,1 y el ajuste "
        "completo a 56,4.",
        "qlora": "La base en su forma normal no cabe ({need}, de {room}); en 4 bits, sí. Con NF4 los resultados publicados igualaron los de "
        "16 bits.",
        "full_too_large": "El ajuste completo necesitaría {need}, de {room}.",
        "nothing_fits": "Ningún método cabe en {room}: el menor necesita {need}. Una base más pequeña, filas más cortas o una máquina mayor.",
        "dpo": "Hay pares: aprender de ellos directamente (DPO) hace lo que un modelo de recompensa y el aprendizaje por refuerzo, con más "
        "sencillez. Enseña primero las respuestas y sigue desde esa ejecución con los pares.",
        "collect_pairs": "Lo que debería decir más bien se aprende mejor de pares de una respuesta mejor y una peor: junta algunos con "
        "`afina prefer` y sigue desde esta ejecución con --objective dpo.",
        "slora": "Una base sirvió miles de adaptadores casi a la velocidad de uno. Un LoRA normal de rango pequeño es lo que otros servidores "
        "también leen; vLLM no lee DoRA ni MoRA.",
        "alora": "Un LoRA activado actúa solo desde su invocación, de modo que lo leído antes no se lee de nuevo: cambiar fue allí de 20 a "
        "30 veces más rápido. Tomaron rango 32.",
        "earlier_same": "Tu comparación {name} con esta base: {figures}. No habla en contra.",
        "earlier_none": "Tu comparación {name} con esta base no encontró ningún método mejor que la base sola: con datos así, déjala "
        "como está, o trae más filas.",
        "earlier_better": "Tu comparación {name} con esta base mostró que {better} es mejor que {worse} ({figures}): va antes que lo que "
        "otros midieron.",
        "study_confirmed": "Nuestro propio estudio con la pequeña base incluida está de acuerdo: {figures}.",
        "study_not_confirmed": "Nuestro propio estudio con la pequeña base incluida no lo mostró: {figures}. El hallazgo trata de bases "
        "mayores; `afina compare` lo dice para la tuya.",
        "study_depends": "En nuestro propio estudio con la pequeña base incluida depende: {figures}.",
        "no_plan": "No se conocen memoria ni tiempo: {why}",
        "title": "Consejo",
        "use": "usa",
        "prompt": "una pregunta con ejemplos, sin entrenar",
        "find": "recuperación, sin entrenar",
        "none": "ninguno: nada cabe",
        "settings": "ajustes",
        "machine": "esta máquina",
        "told": "sitio",
        "memory": "memoria máxima",
        "step": "un paso",
        "command": "escribe",
        "then": "después",
        "source": "según",
    },
}


@cache
def studied() -> dict[str, dict[str, str]]:
    """What our study says to the claims that have run: {claim: {"verdict", "figures"}}."""
    found: dict[str, dict[str, str]] = json.loads(
        (Path(__file__).parent / "study.json").read_text(encoding="utf-8")
    )
    return found


def study_note(saying: str, lang: str) -> str:
    """What our study says to a finding, with a space before it; empty where it says nothing."""
    known = studied().get(STUDIED.get(saying, ""))
    if known is None:
        return ""
    return " " + SAYINGS[lang]["study_" + known["verdict"].replace(" ", "_")].format(
        figures=known["figures"]
    )
