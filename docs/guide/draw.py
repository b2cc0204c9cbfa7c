"""The guide's pictures, as SVG, in each language: `python docs/guide/draw.py` draws them again.

A picture is a function that draws on a sheet with its words; words.yaml has the words, one line a label. Numbers in the
pictures are worked out here, so that they agree with the drawing.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
LANGUAGES = ("en", "es")
INK, GREY, PALE, BASE, LEARNED, SOFT, GOOD, BAD = (
    "#1f2937",
    "#6b7280",
    "#f3f4f6",
    "#64748b",
    "#ea580c",
    "#fed7aa",
    "#15803d",
    "#b91c1c",
)
WIDTH, HEIGHT = 760, 330


class Sheet:
    """A white card to draw on; sizes in pixels, from the top left."""

    def __init__(self, title: str, height: int = HEIGHT) -> None:
        """A sheet; the title is what a screen reader says in its place."""
        self.title, self.height, self.parts = title, height, list[str]()

    def add(self, kind: str, content: str | None = None, **attributes: Any) -> None:
        """One element; underscores in names stand for hyphens."""
        told = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(
            f"<{kind} {told}/>" if content is None else f"<{kind} {told}>{content}</{kind}>"
        )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = PALE,
        line: str = GREY,
        radius: float = 8,
    ) -> None:
        """A rectangle."""
        self.add(
            "rect", x=x, y=y, width=w, height=h, rx=radius, fill=fill, stroke=line, stroke_width=1.5
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 15,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Words around (x, y), the middle of the block; `/` begins a new line."""
        lines = words.split(" / ")
        for number, line in enumerate(lines):
            at = y + 0.35 * size + (number - (len(lines) - 1) / 2) * 1.3 * size
            weight = {"font_weight": 600} if bold else {}
            self.add(
                "text",
                escape(line),
                x=x,
                y=round(at, 1),
                font_size=size,
                fill=fill,
                text_anchor=anchor,
                **weight,
            )

    def card(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        words: str,
        fill: str = PALE,
        ink: str = INK,
        size: int = 15,
        bold: bool = False,
    ) -> None:
        """A rectangle with words in its middle, smaller where they would not fit; a letter is about 0.6 of its size wide."""
        self.box(x, y, w, h, fill)
        largest = (
            (w - 12) / (0.62 if bold else 0.56) / max(len(line) for line in words.split(" / "))
        )
        self.text(x + w / 2, y + h / 2, words, min(size, int(largest)), ink, bold=bold)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, fill: str = INK) -> None:
        """A line with a point at its second end."""
        self.add(
            "line",
            x1=x1,
            y1=y1,
            x2=x2,
            y2=y2,
            stroke=fill,
            stroke_width=2,
            marker_end="url(#point)",
        )

    def around(self, path: str, line: str, **attributes: Any) -> None:
        """An arrow round corners."""
        self.add(
            "path",
            d=path,
            fill="none",
            stroke=line,
            stroke_width=2,
            marker_end="url(#point)",
            **attributes,
        )

    def written(self) -> str:
        """The whole picture."""
        marker = (
            '<defs><marker id="point" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            'font-family="system-ui, sans-serif">'
        )
        card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2}" rx="14" fill="#ffffff" stroke="#d1d5db"/>'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", marker, card, *self.parts, "</svg>\n"]
        )


Words = dict[str, str]


def index(s: Sheet, w: Words) -> None:
    """The road: ask, plan, train, judge, use."""
    for number, step in enumerate(("advise", "plan", "train", "judge", "use")):
        x = 22 + 146 * number
        s.card(x, 70, 118, 62, w[step], SOFT if step == "train" else PALE, size=17, bold=True)
        s.text(x + 59, 190, w[f"{step}_what"], 13, GREY)
        if number:
            s.arrow(x - 26, 101, x - 3, 101)
    s.around("M 519 240 L 519 268 L 81 268 L 81 244", GREY, stroke_dasharray="6 5")
    s.text(300, 290, w["again"], 13, GREY)


def fine_tuning(s: Sheet, w: Words) -> None:
    """A base and examples make a model that answers in your way; the base stays."""
    s.card(28, 50, 190, 100, w["base"], BASE, "#ffffff", bold=True)
    s.card(28, 190, 190, 100, w["examples"], SOFT, bold=True)
    s.arrow(222, 105, 296, 150)
    s.arrow(222, 235, 296, 185)
    s.card(300, 125, 130, 86, w["learn"], PALE)
    s.arrow(434, 168, 498, 168)
    s.box(502, 60, 230, 216, "#ffffff", LEARNED)
    s.card(522, 82, 190, 96, w["same"], BASE, "#ffffff", bold=True)
    s.card(522, 196, 190, 56, w["adapter"], LEARNED, "#ffffff", bold=True)


def lora(s: Sheet, w: Words) -> None:
    """A large frozen square, and two low-rank matrices."""
    size, rank = 1000, 8
    s.card(60, 60, 190, 190, w["frozen"], BASE, "#ffffff", 17, bold=True)
    s.text(
        155,
        276,
        w["many"].format(n=w["thousands"].format(*divmod(size * size // 1000, 1000))),
        14,
        GREY,
    )
    s.text(305, 155, "+", 40)
    s.box(370, 60, 22, 190, LEARNED, LEARNED, 4)
    s.box(412, 60, 190, 22, LEARNED, LEARNED, 4)
    s.text(510, 155, w["strips"], 17, LEARNED, bold=True)
    few = 2 * size * rank
    s.text(490, 276, w["few"].format(n=w["thousand"].format(few // 1000)), 14, GREY)
    share = w["decimal"].format(100 * few / size / size).replace(".", w["point"])
    s.text(680, 155, share, 22, LEARNED, bold=True)
    s.text(380, 306, w["sum"], 13, GREY)


def qlora(s: Sheet, w: Words) -> None:
    """A base in 16 bits and in 4, to scale, with its adapter in 16."""
    for number, (bits, gigabytes) in enumerate(((16, 16.0), (4, 4.1))):
        y, length = 60 + 100 * number, 32 * gigabytes
        s.text(28, y + 27, w[f"bits{bits}"], 15, anchor="start")
        s.box(150, y, length, 54, BASE)
        s.text(
            150 + length / 2,
            y + 27,
            w["size"].format(f"{gigabytes:g}".replace(".", w["point"])),
            15,
            "#ffffff",
            bold=True,
        )
    s.box(287, 160, 12, 54, LEARNED, LEARNED, 3)
    s.text(310, 187, w["adapter"], 14, LEARNED, "start", bold=True)
    for step in range(16):
        s.box(150 + 32 * step, 252, 26, 22, f"hsl(215 20% {92 - 4 * step}%)", "none", 3)
    s.text(28, 263, w["shades"], 14, anchor="start")
    s.text(405, 300, w["nearest"], 13, GREY)


def mora(s: Sheet, w: Words) -> None:
    """The same count of numbers as two low-rank matrices or as one square."""
    rank, size = 8, 1000
    side = int((2 * size * rank) ** 0.5)
    s.text(190, 44, "LoRA", 20, bold=True)
    s.box(95, 76, 18, 160, LEARNED, LEARNED, 4)
    s.box(130, 76, 160, 18, LEARNED, LEARNED, 4)
    s.text(215, 160, w["narrow"].format(rank), 15, GREY)
    s.text(190, 272, f"2 × {size} × {rank} = {w['thousand'].format(2 * size * rank // 1000)}", 15)
    s.add("line", x1=380, y1=36, x2=380, y2=290, stroke="#d1d5db", stroke_width=2)
    s.text(570, 44, "MoRA", 20, bold=True)
    s.card(404, 130, 74, 56, w["fold"], PALE, size=13)
    s.arrow(480, 158, 506, 158)
    s.card(510, 98, 120, 120, w["square"].format(side), LEARNED, "#ffffff", bold=True)
    s.arrow(632, 158, 658, 158)
    s.card(662, 130, 78, 56, w["unfold"], PALE, size=13)
    s.text(
        570, 272, f"{side} × {side} = {side * side // 1000}{w['comma']}{side * side % 1000:03}", 15
    )
    s.text(380, 310, w["same"], 13, GREY)


def alora(s: Sheet, w: Words) -> None:
    """A conversation as a row of tokens: who acts where, and what has to be read again."""
    for y, name, start in ((70, "LoRA", 0), (200, "aLoRA", 14)):
        s.text(28, y + 20, name, 18, anchor="start", bold=True)
        for token in range(20):
            s.box(110 + 31 * token, y, 25, 40, LEARNED if token >= start else BASE, "none", 5)
        s.text(110, y + 64, w[name], 14, GREY if start else LEARNED, "start")
        s.add(
            "line",
            x1=541,
            y1=y - 14,
            x2=541,
            y2=y + 50,
            stroke=INK,
            stroke_width=2,
            stroke_dasharray="5 5",
        )
    s.text(110 + 31 * 7, 44, w["conversation"], 14, GREY)
    s.text(110 + 31 * 17, 44, w["answer"], 14, GREY)
    s.text(541, 292, w["invocation"], 14, bold=True)


def many_adapters(s: Sheet, w: Words) -> None:
    """Questions for several adapters go through one base together."""
    colours = ("#ea580c", "#0d9488", "#7c3aed", BASE)
    for number, colour in enumerate(colours):
        y = 42 + 64 * number
        s.card(24, y, 190, 46, w[f"ask{number + 1}"], "#ffffff", colour, 14)
        s.arrow(218, y + 23, 284, 140 + 14 * number)
        s.card(556, y, 180, 46, w[f"name{number + 1}"], colour, "#ffffff", 15, bold=True)
        s.add(
            "line", x1=482, y1=140 + 14 * number, x2=554, y2=y + 23, stroke=colour, stroke_width=3
        )
    s.card(288, 92, 192, 140, w["base"], BASE, "#ffffff", 17, bold=True)
    s.text(380, 308, w["together"], 14, GREY)


def rlhf(s: Sheet, w: Words) -> None:
    """The round: a question, two answers, a choice, a change."""
    s.card(24, 120, 120, 70, w["question"], PALE)
    s.arrow(147, 155, 186, 155)
    s.card(190, 110, 120, 90, w["model"], BASE, "#ffffff", bold=True)
    s.arrow(313, 140, 366, 102)
    s.arrow(313, 170, 366, 208)
    s.card(370, 66, 150, 64, w["one"], "#ffffff", GOOD)
    s.card(370, 180, 150, 64, w["two"], "#ffffff", BAD)
    s.arrow(523, 102, 580, 142)
    s.arrow(523, 208, 580, 168)
    s.card(584, 110, 150, 90, w["judge"], SOFT, bold=True)
    s.around("M 659 204 L 659 284 L 250 284 L 250 206", LEARNED)
    s.text(455, 304, w["change"], 14, LEARNED, bold=True)


def safety(s: Sheet, w: Words) -> None:
    """Four gates one after another, and the three verdicts."""
    s.card(20, 104, 104, 76, w["adapter"], LEARNED, "#ffffff", bold=True)
    for number, gate in enumerate(("files", "origin", "weights", "behaviour")):
        x = 154 + 112 * number
        s.arrow(x - 28, 142, x - 3, 142)
        s.box(x, 60, 84, 164, PALE)
        s.text(x + 42, 92, w[gate], 14, bold=True)
        s.text(x + 42, 158, w[f"{gate}_what"], 12, GREY)
    for y, verdict, colour in (
        (56, "allow", GOOD),
        (120, "review", "#b45309"),
        (184, "block", BAD),
    ):
        s.arrow(576, 142, 612, y + 24)
        s.card(616, y, 124, 48, w[verdict], colour, "#ffffff", bold=True)
    s.text(380, 276, w["proof"], 14, GREY)


def choosing(s: Sheet, w: Words) -> None:
    """Questions from top to bottom; a yes leads to the right."""
    for number in range(6):
        y = 22 + 68 * number
        s.card(30, y, 400, 48, w[f"ask{number + 1}"], PALE, size=14)
        s.arrow(432, y + 24, 508, y + 24)
        s.text(468, y + 12, w["yes"], 13, GREY)
        s.card(
            512,
            y,
            222,
            48,
            w[f"use{number + 1}"],
            SOFT if number > 1 else "#dbeafe",
            size=14,
            bold=True,
        )
        if number < 5:
            s.arrow(230, y + 50, 230, y + 66)
            s.text(250, y + 58, w["no"], 13, GREY, "start")
    s.arrow(230, 412, 230, 432)
    s.text(250, 422, w["no"], 13, GREY, "start")
    s.card(130, 434, 200, 40, w["else"], SOFT, size=14, bold=True)


def report(s: Sheet, w: Words) -> None:
    """Intervals: two that are separate, two that overlap."""
    s.text(380, 36, w["title"], 15, GREY)
    for x in (0, 25, 50, 75, 100):
        at = 170 + 5.2 * x
        s.add("line", x1=at, y1=60, x2=at, y2=262, stroke="#e5e7eb", stroke_width=1.5)
        s.text(at, 280, f"{x} %" if w["point"] == "," else f"{x}%", 13, GREY)
    shown = (
        ("base", 6, 10, 14, BASE),
        ("lora", 72, 80, 88, LEARNED),
        ("mora", 66, 76, 86, LEARNED),
    )
    for number, (name, low, mean, high, colour) in enumerate(shown):
        y = 88 + 68 * number
        s.text(28, y, w.get(name, name), 16, anchor="start", bold=True)
        ends = {"x1": 170 + 5.2 * low, "x2": 170 + 5.2 * high}
        s.add("line", **ends, y1=y, y2=y, stroke=colour, stroke_width=8, stroke_linecap="round")
        s.add("circle", cx=170 + 5.2 * mean, cy=y, r=8, fill=INK)
    s.text(400, 122, w["separate"], 14, GOOD, bold=True)
    s.text(400, 190, w["overlap"], 14, "#b45309", bold=True)
    s.text(380, 308, w["interval"], 13, GREY)


PICTURES: dict[str, Callable[[Sheet, Words], None]] = {
    "index": index,
    "fine-tuning": fine_tuning,
    "lora": lora,
    "qlora": qlora,
    "mora": mora,
    "alora": alora,
    "many-adapters": many_adapters,
    "rlhf": rlhf,
    "safety": safety,
    "choosing": choosing,
    "report": report,
}
HEIGHTS = {"safety": 300, "choosing": 490}  # the others have HEIGHT


def drawn(name: str, language: str) -> tuple[Path, str]:
    """The file of a picture, and what has to be in it."""
    words = yaml.safe_load((HERE / "words.yaml").read_text(encoding="utf-8"))
    own = {key: both[language] for key, both in (words["all"] | words[name]).items()}
    sheet = Sheet(own["alt"], HEIGHTS.get(name, HEIGHT))
    PICTURES[name](sheet, own)
    return HERE / language / "pictures" / f"{name}.svg", sheet.written()


def main() -> None:
    """Draw all of them."""
    for name in PICTURES:
        for language in LANGUAGES:
            file, text = drawn(name, language)
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
