"""When what happened: a lane for each kind of event on one axis of time."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup

from llm_unlearn.run_report.contents import Moment

LANES = ("trained", "acknowledged", "carried out", "open deadlines", "copies")
LEFT, WIDTH, RIGHT, LANE = 110, 640, 60, 24
TICK = 4
LABELS = 4


def draw_timeline(moments: Sequence[Moment], now: float) -> Markup | None:
    """The lanes that have anything in them; None if nothing ever happened."""
    lanes = [lane for lane in LANES if any(moment.kind == lane for moment in moments)]
    if not lanes:
        return None
    times = [moment.time for moment in moments]
    start, end = min(times), max([*times, now] if "open deadlines" in lanes else times)
    span = max(end - start, 1e-3)

    def place(time: float) -> float:
        return LEFT + WIDTH * (time - start) / span

    parts = [
        _lane(lane, number, [place(m.time) for m in moments if m.kind == lane])
        for number, lane in enumerate(lanes)
    ]
    bottom = len(lanes) * LANE
    if start < now < end:
        parts.append(
            Markup('<line class="now" x1="{0:.1f}" y1="0" x2="{0:.1f}" y2="{1}"/>').format(
                place(now), bottom
            )
        )
    labels = LABELS if span > 2 * LABELS else 1
    for number in range(labels + 1):
        anchor = "start" if number == 0 else "end" if number == labels else "middle"
        parts.append(
            Markup('<text class="tick" text-anchor="{}" x="{:.1f}" y="{}">{}</text>').format(
                anchor,
                LEFT + WIDTH * number / labels,
                bottom + 16,
                _label(start + span * number / labels, span),
            )
        )
    said = "; ".join(f"{lane}: {sum(m.kind == lane for m in moments)}" for lane in lanes)
    return Markup(
        '<svg class="timeline" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
        'aria-label="From {start} to {end} UTC: {said}">{parts}</svg>'
    ).format(
        w=LEFT + WIDTH + RIGHT,
        h=bottom + 24,
        start=_label(start, 0),
        end=_label(end, 0),
        said=said,
        parts=Markup("\n").join(parts),
    )


def _lane(lane: str, number: int, places: Sequence[float]) -> Markup:
    """One lane. What falls on the same few pixels is drawn once, the higher the more it is."""
    middle = number * LANE + LANE // 2
    piles = Counter(round(place / TICK) * TICK for place in places)
    ticks = [
        Markup('<rect class="{}" x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>').format(
            lane.replace(" ", "-"), x - TICK / 2, middle - height / 2, TICK - 1, height
        )
        for x, count in sorted(piles.items())
        for height in [min(8 + 2.0 * (count - 1), LANE - 6)]
    ]
    return Markup(
        '<text class="lane" x="0" y="{text}">{lane}</text>'
        '<line class="axis" x1="{left}" y1="{middle}" x2="{right}" y2="{middle}"/>{ticks}'
        '<text class="lane" x="{after}" y="{text}">{total}</text>'
    ).format(
        text=middle + 4,
        lane=lane,
        left=LEFT,
        middle=middle,
        right=LEFT + WIDTH,
        ticks=Markup("").join(ticks),
        after=LEFT + WIDTH + 10,
        total=f"{len(places):,}",
    )


def _label(time: float, span: float) -> str:
    """A moment on the axis, as fine as the span asks for (0: to the second, with its day)."""
    moment = datetime.fromtimestamp(time, UTC)
    if span > 3 * 86400:
        return moment.strftime("%Y-%m-%d")
    if span > 600:
        return moment.strftime("%m-%d %H:%M")
    return moment.strftime("%H:%M:%S" if span else "%Y-%m-%d %H:%M:%S")
