"""What guides and papers say of these methods, and how each saying is decided by the parts of the study.

Rules were written before the results were there. "Margin" is 5 points of a score, or 0.05 nats of a loss.
"""

from collections.abc import Callable

from verdicts import (
    CONFIRMED,
    DEPENDS,
    REFUTED,
    Claim,
    Point,
    Results,
    as_good,
    below,
    better,
    gap,
    less,
    spread,
)

REGRET = ("LoRA Without Regret, 2025", "https://thinkingmachines.ai/blog/lora/")
LEARNS_LESS = ("LoRA Learns Less and Forgets Less, 2024", "https://arxiv.org/abs/2405.09673")
MORA = ("MoRA, 2024", "https://arxiv.org/abs/2405.12130")
QLORA = ("QLoRA, 2023", "https://arxiv.org/abs/2305.14314")
TIMES = (
    3.0,
    30.0,
)  # what passes for "about ten times"; the rates that were tried lie a factor of 3.2 apart


def rates(results: Results, part: str) -> Point:
    """For: the rate that LoRA's search chose is 3 to 30 times full fine-tuning's."""
    lora, full = (results[part]["methods"][name]["learning_rate"] for name in ("lora", "full"))
    return Point(
        part,
        f"{lora:.2g} / {full:.2g} = {lora / full:.0f} times",
        TIMES[0] <= lora / full <= TIMES[1],
    )


def share_of_gain(one: str, other: str, least: float) -> Callable[[Results, str], Point]:
    """For: `one` gains at least `least` of what `other` gains over the base, by the means; neither where `other` gains nothing."""

    def judge(results: Results, part: str) -> Point:
        some, whole = (gap(results[part], name, "base") for name in (one, other))
        holds = some.mean >= least * whole.mean if whole.shown and whole.mean > 0 else None
        return Point(part, f"{one} − base: {some}; {other} − base: {whole}", holds)

    return judge


def memory(one: str, other: str, times: float) -> Callable[[Results, str], Point]:
    """For: `other` takes at least `times` the peak memory of `one`, the whole process counted."""

    def judge(results: Results, part: str) -> Point:
        few, much = (results[part]["methods"][name]["peak_mb"] for name in (one, other))
        return Point(part, f"{other} {much:,.0f} MB, {one} {few:,.0f} MB", much >= times * few)

    return judge


def rank(name: str, small: str) -> Callable[[Results, str], Point]:
    """For: the larger rank's score is above the smaller one's (part `small`), and their intervals do not touch."""

    def judge(results: Results, part: str) -> Point:
        if small not in results:
            return Point(part, f"{small} has not run", None)
        sign = -1.0 if results[part]["metric"] == "loss" else 1.0
        high, low = (results[p]["methods"][name]["score"] for p in (part, small))
        form = "{:.3f}" if sign < 0 else "{:.1f}"
        figures = f"{name}: rank 64 {spread(high, form)}, rank 8 {spread(low, form)}"
        return Point(part, figures, below(low, high) if sign > 0 else below(high, low))

    return judge


def quantised(results: Results, part: str) -> Point:
    """For: QLoRA is no worse than LoRA by the margin or more, though the base in 4 bits loses something before training."""
    found, four = results[part], results[part]["nf4_figures"]
    after = gap(found, "qlora", "lora")
    worse = after.shown and after.mean < -after.margin
    before = spread(four["loss_change"])
    figures = f"base in 4 bits: loss {before} nats; qlora − lora after training: {after}"
    return Point(part, figures, True if after.low > -after.margin else False if worse else None)


def few_rows(name: str, many: str) -> Callable[[Results, str], Point]:
    """For: overfitting with few rows is above that with many (part `many`), and the intervals do not touch."""

    def judge(results: Results, part: str) -> Point:
        if many not in results:
            return Point(part, f"{many} has not run", None)
        few, much = (results[p]["methods"][name]["overfitting"] for p in (part, many))
        rows = [results[p]["data"]["train"] for p in (part, many)]
        return Point(
            part,
            f"{name}: {rows[0]:,} rows {spread(few)}, {rows[1]:,} rows {spread(much)} nats",
            below(much, few),
        )

    return judge


def other_base(name: str, better: str, other: str) -> Callable[[Results, str], Point]:
    """For: `name` on the better base (part `better`) is above `other` on the part's own, and the intervals do not touch."""

    def judge(results: Results, part: str) -> Point:
        if better not in results:
            return Point(part, f"{better} has not run", None)
        high, low = (
            results[better]["methods"][name]["score"],
            results[part]["methods"][other]["score"],
        )
        figures = f"{name} on the embedded base {spread(high, '{:.1f}')}, {other} on the early one {spread(low, '{:.1f}')} points"
        return Point(part, figures, below(low, high))

    return judge


def said(yes: str, no: str, depends: str) -> dict[str, str]:
    """What each verdict means in plain words."""
    return {CONFIRMED: yes, REFUTED: no, DEPENDS: depends}


CLAIMS = [
    Claim(
        "as-good",
        "LoRA on all layers learns as much as full fine-tuning, as long as the data does not exceed what it can hold.",
        *REGRET,
        ("correct", "classify", "follow", "translate", "add", "memorise"),
        "for: lora may be worse than full by less than the margin; against: shown to be worse by more",
        as_good("lora", "full"),
        said(
            "LoRA did as well as training every number of the model.",
            "Training every number of the model reached further than LoRA did.",
            "LoRA kept up with training everything in some of the tasks, and not visibly in others.",
        ),
    ),
    Claim(
        "ten-times",
        "LoRA wants about ten times the learning rate of full fine-tuning.",
        *REGRET,
        ("correct", "classify", "follow", "translate", "add", "memorise", "pretrain"),
        "for: the rates chosen are 3 to 30 times apart",
        rates,
        said(
            "LoRA's best rate was 3 to 30 times that of full fine-tuning: the advice holds, roughly.",
            "The advice to take ten times the rate does not hold.",
            "Ten times the rate was right in some tasks and not in others: let a short search choose.",
        ),
    ),
    Claim(
        "learns-less",
        "Where much is to be learned, as in continued pretraining, LoRA learns less than full fine-tuning.",
        *LEARNS_LESS,
        ("pretrain", "translate"),
        "for: full is shown to be better; against: it is better by less than the margin",
        better("full", "lora"),
        said(
            "With a new domain or language, training everything learned more.",
            "Even with a new domain or language, training everything learned no more.",
            "Whether training everything learns more depends on the text.",
        ),
    ),
    Claim(
        "forgets-less",
        "LoRA forgets less of the rest than full fine-tuning.",
        *LEARNS_LESS,
        ("correct", "classify", "follow", "translate", "add", "memorise", "pretrain"),
        "for: the intervals of forgetting do not touch, lora's below",
        less("forgetting", "lora", "full"),
        said(
            "LoRA forgot less of the general text.",
            "LoRA forgot more of the general text, not less.",
            "LoRA did not forget less in all parts: it depends on the task and on the learning rate.",
        ),
    ),
    Claim(
        "mora-facts",
        "MoRA memorises new facts better than LoRA with as many numbers.",
        *MORA,
        ("memorise",),
        "for: mora is shown to be better; against: it is better by less than the margin",
        better("mora", "lora"),
        said(
            "MoRA memorised more new facts than LoRA.",
            "MoRA did not memorise new facts better than LoRA.",
            "These rows do not distinguish MoRA from LoRA at memorizing facts.",
        ),
    ),
    Claim(
        "arithmetic",
        "In arithmetic LoRA and MoRA of small rank stay below full fine-tuning.",
        *MORA,
        ("add",),
        "for: full is shown to be better than mora; against: it is better by less than the margin",
        better("full", "mora"),
        said(
            "At adding numbers, training everything did better than MoRA of rank 8.",
            "At adding numbers, MoRA of rank 8 did as well as training everything.",
            "These rows do not distinguish MoRA from full fine-tuning at adding numbers.",
        ),
    ),
    Claim(
        "arithmetic-rank",
        "A larger rank closes MoRA's gap in arithmetic.",
        *MORA,
        ("add-rank-64",),
        "for: the score at rank 64 is above that at rank 8, and the intervals do not touch",
        rank("mora", "add"),
        said(
            "Rank 64 brought MoRA further than rank 8.",
            "Rank 64 did worse than rank 8.",
            "Rank 64 has no measurable effect.",
        ),
    ),
    Claim(
        "facts-rank",
        "A larger rank makes LoRA memorise more.",
        *MORA,
        ("memorise-rank-64",),
        "for: the score at rank 64 is above that at rank 8, and the intervals do not touch",
        rank("lora", "memorise"),
        said(
            "Rank 64 memorised more than rank 8.",
            "Rank 64 memorised less than rank 8.",
            "Rank 64 has no measurable effect.",
        ),
    ),
    Claim(
        "mlp",
        "At equal numbers, LoRA on the MLP layers alone is as good as on all layers.",
        *REGRET,
        ("layers",),
        "for: mlp may be worse than all-linear by less than the margin; against: shown to be worse by more",
        as_good("mlp", "all-linear"),
        said(
            "The MLP layers alone did as well as all of them.",
            "The MLP layers alone did worse than all of them.",
            "These rows do not distinguish the MLP layers from all linear layers.",
        ),
    ),
    Claim(
        "attention",
        "At equal numbers, LoRA on the attention alone is worse than on the MLP layers.",
        *REGRET,
        ("layers",),
        "for: mlp is shown to be better than attention; against: better by less than the margin",
        better("mlp", "attention"),
        said(
            "The attention alone did worse.",
            "The attention alone did no worse.",
            "These rows do not distinguish attention from MLP layers.",
        ),
    ),
    Claim(
        "auto",
        "Ranks chosen by gradient energy (targets: auto) do better than one rank for all layers.",
        "afina's own claim",
        "",
        ("layers",),
        "for: auto is shown to be better than all-linear; against: better by less than the margin",
        better("auto", "all-linear"),
        said(
            "Choosing the layers by their gradients paid.",
            "Choosing the layers by their gradients did not pay.",
            "These rows do not show whether choosing ranks by gradient energy pays.",
        ),
    ),
    Claim(
        "last-layers",
        "The last quarter of the layers reaches 90% of what full fine-tuning gains.",
        "What Would Elsa Do?, 2019",
        "https://arxiv.org/abs/1911.03090",
        ("correct", "classify"),
        "for: freeze gains at least 90% of what full gains over the base",
        share_of_gain("freeze", "full", 0.9),
        said(
            "Training the last layers alone was nearly enough.",
            "Training the last layers alone was not enough.",
            "Training the last layers alone was enough in some tasks only.",
        ),
    ),
    Claim(
        "dora",
        "DoRA is better than LoRA.",
        "DoRA, 2024",
        "https://arxiv.org/abs/2402.09353",
        ("correct",),
        "for: dora is shown to be better; against: it is better by less than the margin",
        better("dora", "lora"),
        said(
            "DoRA did better than LoRA.",
            "DoRA did no better than LoRA.",
            "These rows do not distinguish DoRA from LoRA.",
        ),
    ),
    Claim(
        "four-bits",
        "What a base in 4 bits loses, training wins back: QLoRA is as good as LoRA.",
        *QLORA,
        ("correct-nf4",),
        "for: qlora may be worse than lora by less than the margin; against: shown to be worse by more",
        quantised,
        said(
            "After training, the model in 4 bits was as good as the one in 16.",
            "The model in 4 bits stayed behind after training.",
            "These rows do not show whether the 4-bit base is worse after training.",
        ),
    ),
    Claim(
        "base",
        "A better base matters more than a stronger method.",
        "common advice",
        "",
        ("correct-early",),
        "for: lora on the embedded base scores above full fine-tuning on an early checkpoint, and the intervals do not touch",
        other_base("lora", "correct", "full"),
        said(
            "The better base with the smaller method won.",
            "The weaker base with the stronger method won.",
            "These rows do not show whether the base or the method matters more.",
        ),
    ),
    Claim(
        "few-rows",
        "The fewer the rows, the more a model learns them by heart (overfits).",
        "common advice",
        "",
        ("correct-100",),
        "for: full fine-tuning overfits more than with ten times the rows, and the intervals do not touch",
        few_rows("full", "correct"),
        said(
            "With few rows the model learned the rows rather than the task.",
            "Few rows were no harm.",
            "Few rows have no measurable effect.",
        ),
    ),
    Claim(
        "overfits-less",
        "LoRA overfits less than full fine-tuning when rows are few.",
        *LEARNS_LESS,
        ("correct-100",),
        "for: the intervals of overfitting do not touch, lora's below",
        less("overfitting", "lora", "full"),
        said(
            "With few rows LoRA was the safer choice.",
            "With few rows LoRA overfitted more.",
            "With few rows, no difference in overfitting between LoRA and full fine-tuning is measurable.",
        ),
    ),
    Claim(
        "memory",
        "LoRA needs a third of the memory of full fine-tuning.",
        "LoRA, 2021",
        "https://arxiv.org/abs/2106.09685",
        ("correct", "add", "memorise"),
        "for: full takes at least 3 times lora's peak memory, the whole process counted",
        memory("lora", "full", 3.0),
        said(
            "LoRA took a third of the memory.",
            "With a model this small the libraries fill the memory, and LoRA saves little of it; the saving grows with the model.",
            "It depends on the size of the rows.",
        ),
    ),
]
