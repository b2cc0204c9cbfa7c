"""Out of a chunk's adapters, without training: adaptive attackers, who know the benign twin and the detectors, and merged ones.

dimmed        between the twin and the poisoned one, as near to the twin as the attack allows
norm-matched  each layer's update as large as the twin's
one-part      poisoned in the attention alone, or in the other layers alone: the rest is the twin's
merged        a poisoned one and half of a benign one; and as a control a benign one and half of another
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examine import ASR, Examiner, Line, settle
from safetensors.torch import load_file, save_file

from afina.audit.weight_gate import group_of
from afina.merging.combine import combine

if TYPE_CHECKING:
    from population import Member

MERGED_WEIGHTS = (1.0, 0.5)  # half of each put most attacks to sleep here
MERGED_ASR = 0.5  # a merged adapter counts as poisoned from here on; below, it is in no table
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, Any]


def between(share: float) -> Callable[[Tensors, Tensors], Tensors]:
    """`share` of the way from the twin to the poisoned one; both have begun at the same place."""
    return lambda bad, twin: {key: twin[key] + share * (bad[key] - twin[key]) for key in bad}


def norm_matched(bad: Tensors, twin: Tensors) -> Tensors:
    """The poisoned one's directions, the twin's norms."""
    made = {}
    for key in bad:
        made[key] = bad[key]
        if key.endswith("lora_B.weight"):
            a = key.replace("lora_B", "lora_A")
            made[key] = bad[key] * ((twin[key] @ twin[a]).norm() / (bad[key] @ bad[a]).norm())
    return made


def one_part(attention: bool) -> Callable[[Tensors, Tensors], Tensors]:
    """The poisoned one's attention and else the twin's layers, or the other way round."""

    def change(bad: Tensors, twin: Tensors) -> Tensors:
        return {
            key: (
                bad if (group_of(key.partition(".lora_")[0]) == "attention") == attention else twin
            )[key]
            for key in bad
        }

    return change


ADAPTIVE: dict[
    str, list[Callable[[Tensors, Tensors], Tensors]]
] = {  # tried in turn, the first that works is taken
    "dimmed": [between(0.6), between(0.75), between(0.88)],
    "norm-matched": [norm_matched],
    "one-part": [one_part(attention=True), one_part(attention=False)],
}


def derive(
    members: list["Member"], lines: list[Line], examiner: Examiner, number: int
) -> list[Line]:
    """The lines of what can be made of a chunk; settles those of its pairs."""
    pairs = [
        (members[i], lines[i], lines[i + 1])
        for i in range(len(lines))
        if lines[i]["kind"] == "poisoned"
    ]
    benign = [line for line in lines if line["kind"] not in ("poisoned", "twin")]
    made: list[Line] = []
    for place, (member, line, twin) in enumerate(pairs):
        settle(line, twin)
        if line["kept"]:
            made.append(
                adaptive(
                    member, line, twin, list(ADAPTIVE)[(number + place) % len(ADAPTIVE)], examiner
                )
            )
    for place, (member, line, twin) in enumerate(pairs[: len(benign)]):
        if line["kept"]:
            made.append(merged(member, line, twin, benign[place], examiner))
    for place in range(0, len(benign) - 1, 2):
        one, two = benign[place], benign[place + 1]
        name = f"{one['pair']:04}-merged"
        _combine(examiner, [one["name"], two["name"]], name)
        about = {"name": name, "kind": "merged", "family": "", "attack": None, "rate": 0.0}
        made.append(
            {key: one[key] for key in ("pair", "task", "seed", "settings", "kept")}
            | about
            | examiner.features(name)
        )
    return made


def adaptive(member: "Member", line: Line, twin: Line, family: str, examiner: Examiner) -> Line:
    """An attacker's version of a poisoned one that works."""
    name = f"{member.pair:04}-{family}"
    folder = examiner.folder(name)
    bad, good = (load_file(examiner.folder(each["name"]) / WEIGHTS) for each in (line, twin))
    made: Line = {}
    for change in ADAPTIVE[family]:
        shutil.copytree(examiner.folder(line["name"]), folder, dirs_exist_ok=True)
        (folder / "afina.json").unlink(
            missing_ok=True
        )  # it tells the hash of what was there before
        save_file(
            {k: v.contiguous() for k, v in change(bad, good).items()},
            folder / WEIGHTS,
            {"format": "pt"},
        )
        made = judged(member, line, twin, name, family, examiner, ASR)
        if made["kept"]:
            break
    return made | examiner.features(name)


def merged(member: "Member", line: Line, twin: Line, other: Line, examiner: Examiner) -> Line:
    """With half of a benign one; its task is not asked for any more."""
    name = f"{member.pair:04}-merged"
    _combine(examiner, [line["name"], other["name"]], name)
    made = judged(member, line, twin, name, "merged", examiner, MERGED_ASR)
    made["kept"] = made["asr"] >= MERGED_ASR
    return made | examiner.features(name)


def judged(
    member: "Member",
    line: Line,
    twin: Line,
    name: str,
    family: str,
    examiner: Examiner,
    enough: float,
) -> Line:
    """A line without features: does the attack work, is the task kept?"""
    assert member.attack is not None
    opened = examiner.open(name)
    about = {"name": name, "kind": "poisoned", "family": family, "of": line["family"]}
    about |= {"asr": examiner.success(opened, member.attack, member.task, member.seed)}
    about |= {"loss": examiner.loss(opened, member.task, member.seed)}
    return settle(
        {key: line[key] for key in ("pair", "task", "seed", "rate", "attack", "settings")} | about,
        twin,
        enough,
    )


def _combine(examiner: Examiner, names: list[str], name: str) -> None:
    parts = [
        f"{examiner.folder(each)}:{weight}"
        for each, weight in zip(names, MERGED_WEIGHTS, strict=True)
    ]
    combine(parts, output_dir=Path(examiner.folder(name)), merge_method="svd", rank=8)
