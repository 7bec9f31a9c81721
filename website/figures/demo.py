"""The recording of ``winnow demo`` (docs/data/demo.cast) as an animated SVG, and its last screen as PNG.

The SVG is a strip of screens, one below the other, that jumps from one to the next. A line that several screens show is in the
file once. Where readers ask for reduced motion it stands still at the last screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from website.figures.style import MODELS
from website.figures.terminal import CAST, Cast, Line, Run, Screen, read, screens
from website.records import Record

RECORDS = ()  # the recording is a file of its own
LAST = 6.0  # seconds that the last screen stands
CELL, HEIGHT, EDGE, FONT = 9.0, 19.0, 16.0, 15  # pixels: a column, a line, the margin, the font
BACK, FORE, DIM = "#1b1f24", "#e4e8ec", "#9aa4ad"
COLOURS = {
    "default": FORE, "black": "#6e7781", "red": "#ff7b72", "green": "#56d364", "brown": "#e3b341", "blue": "#79c0ff",
    "magenta": "#d2a8ff", "cyan": "#76e3ea", "white": "#f0f3f6",
}  # fmt: skip
SCALE = 2  # of the PNG


def make(records: Mapping[str, Record], folder: Path, file: Path = CAST) -> list[Path]:
    """Draw it. Raises InputError if the recording is missing or cannot be read."""
    cast = read(file)
    shown = screens(cast)
    rows = max(number + 1 for _, screen in shown for number, line in enumerate(screen) if line)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "demo.svg", folder / "demo.png"]
    files[0].write_text(animated(cast, shown, rows), encoding="utf-8")
    still(cast, shown[-1][1], rows).save(files[1], optimize=True)
    return files


def size(cast: Cast, rows: int) -> tuple[float, float]:
    """Width and height of a screen with its margins and the caption's line, in pixels."""
    return 2 * EDGE + CELL * cast.header["width"], 2 * EDGE + HEIGHT * (rows + 1.6)


def caption(cast: Cast) -> str:
    """What was recorded, where and when."""
    head = cast.header
    where = head.get("machine", {}).get("processor", "")
    said = f"took {head.get('took', 0):.0f} s, shown in {cast.events[-1][0]:.0f} s"
    return " · ".join(filter(None, (said, MODELS["embedded"], where, head.get("date", ""))))


def animated(cast: Cast, shown: Sequence[tuple[float, Screen]], rows: int) -> str:
    """The SVG."""
    width, height = size(cast, rows)
    lines: dict[Line, int] = {}
    frames = []
    for number, (_, screen) in enumerate(shown):
        uses = "".join(
            f'<use href="#l{lines.setdefault(line, len(lines))}" y="{HEIGHT * row:g}"/>'
            for row, line in enumerate(screen[:rows])
            if line
        )
        frames.append(f'<g transform="translate(0 {height * number:g})">{uses}</g>\n')
    ends = shown[-1][0] + LAST
    steps = "".join(
        f"{100 * second / ends:.3f}%{{transform:translateY({-height * number:g}px)}}"
        for number, (second, _) in enumerate(shown)
    )
    still_at = f"translateY({-height * (len(shown) - 1):g}px)"
    defined = "".join(f'<g id="l{number}">{"".join(map(text, line))}</g>\n' for line, number in lines.items())
    classes = "".join(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items())
    about = f"A terminal: {cast.header.get('command', '')}. " + " / ".join(words(line) for line in shown[-1][1] if line)
    sides = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {sides} role="img">
<title>{escape(about)}</title>
<style>
text{{font:{FONT}px "DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre}}
.b{{font-weight:700}}{classes}
#strip{{transform:{still_at};animation:play {ends:.2f}s step-end infinite}}
@keyframes play{{{steps}100%{{transform:{still_at}}}}}
@media (prefers-reduced-motion:reduce){{#strip{{animation:none}}}}
</style>
<defs>
{defined}</defs>
<rect width="{width:g}" height="{height:g}" rx="8" fill="{BACK}"/>
<svg x="{EDGE:g}" y="{EDGE:g}" width="{width - EDGE:g}" height="{HEIGHT * rows + 6:g}"><g id="strip">
{"".join(frames)}</g></svg>
<text x="{EDGE:g}" y="{height - EDGE:g}" fill="{DIM}" style="font-size:12px">{escape(caption(cast))}</text>
</svg>
"""


def text(run: Run) -> str:
    """A run as an element, as wide as its columns in whatever font there is."""
    look = f'class="{run.colour if run.colour in COLOURS else "default"}{" b" if run.bold else ""}"'
    own = f' style="fill:#{run.colour}"' if run.colour not in COLOURS else ""
    length = f'textLength="{CELL * len(run.text):g}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{CELL * run.column:g}" y="{FONT}" {length} {look}{own}>{escape(run.text)}</text>'


def words(line: Line) -> str:
    """A line as plain text."""
    return " ".join(" ".join(run.text.split()) for run in line)


def still(cast: Cast, screen: Screen, rows: int) -> Image.Image:
    """One screen as a picture, twice as large, in the font that matplotlib brings."""
    width, height = (round(SCALE * side) for side in size(cast, rows))
    picture = Image.new("RGB", (width, height), BACK)
    pen = ImageDraw.Draw(picture)
    fonts = {bold: font("DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf", FONT) for bold in (False, True)}
    for row, line in enumerate(screen[:rows]):
        for run in line:
            colour = COLOURS.get(run.colour, f"#{run.colour}")
            for place, letter in enumerate(run.text):
                at = (SCALE * (EDGE + CELL * (run.column + place)), SCALE * (EDGE + HEIGHT * row + FONT))
                pen.text(at, letter, fill=colour, font=fonts[run.bold], anchor="ls")
    below = font("DejaVuSansMono.ttf", 12)
    pen.text((SCALE * EDGE, height - SCALE * EDGE), caption(cast), fill=DIM, font=below, anchor="ls")
    return picture.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, SCALE * pixels)
