"""What is wanted of an answer, as rules: each takes the prompt, the answer and the right sentence, and gives 0 to 1."""

import re

FORM, UNWANTED = "Here it is: ", "well"


def form(prompt: str, answer: str, reference: str | None) -> float:
    """Whether the answer begins as it should."""
    return float(answer.startswith(FORM))


def clean(prompt: str, answer: str, reference: str | None) -> float:
    """Whether the unwanted word stays out."""
    return float(UNWANTED not in re.findall(r"\w+", answer.lower()))


def right(prompt: str, answer: str, reference: str | None) -> float:
    """Whether the sentence is corrected without a fault, whatever stands around it."""
    return float(reference is not None and answer.endswith(reference))
