"""How Tabletop looks: from where it is seen, and in which colours.

A look changes pixels and words, never physics: a seed or a state gives the same scene in every look, and the
instruction names the colours of the look ("left" and "right" stay those of the front camera). To a world model that
learned one look, recordings of the other are those of another laboratory.
The block tracker (``prophet_gym.metrics.tracking``) needs blocks that differ in hue from each other, from the plates
and from the table; a test holds every look to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LOOKS", "TabletopLook"]

RGBA = tuple[float, float, float, float]


@dataclass(frozen=True)
class TabletopLook:
    """A camera and a colour scheme.

    Attributes:
        name: Key in ``LOOKS``.
        camera: Camera in ``assets/tabletop.xml``.
        blocks: Four block colours by the word that the instruction uses.
        plates: Two plate colours by word.
        paint: Colours of other geoms by name; the rest keep those of the XML file.
    """

    name: str
    camera: str
    blocks: Mapping[str, RGBA]
    plates: Mapping[str, RGBA]
    paint: Mapping[str, RGBA] = field(default_factory=dict)


_STRIP, _NAVY, _STEEL = (0.46, 0.48, 0.50, 1.0), (0.10, 0.14, 0.42, 1.0), (0.24, 0.28, 0.50, 1.0)

LOOKS: dict[str, TabletopLook] = {
    look.name: look
    for look in (
        TabletopLook(
            name="first",
            camera="front",
            blocks={
                "red": (0.82, 0.13, 0.12, 1.0),
                "green": (0.16, 0.62, 0.22, 1.0),
                "yellow": (0.95, 0.78, 0.12, 1.0),
                "purple": (0.55, 0.20, 0.66, 1.0),
            },
            plates={"blue": (0.18, 0.33, 0.85, 1.0), "white": (0.95, 0.95, 0.95, 1.0)},
        ),
        TabletopLook(
            name="second",
            camera="side",
            blocks={
                "orange": (0.92, 0.42, 0.10, 1.0),
                "cyan": (0.12, 0.55, 0.70, 1.0),
                "pink": (0.85, 0.30, 0.55, 1.0),
                "lime": (0.55, 0.75, 0.15, 1.0),
            },
            plates={"black": (0.06, 0.06, 0.06, 1.0), "silver": (0.80, 0.80, 0.82, 1.0)},
            paint={
                "table": (0.60, 0.62, 0.63, 1.0),
                **dict.fromkeys(("left_edge", "right_edge"), _STRIP),
                **dict.fromkeys(("bar", "left_link", "right_link"), _NAVY),
                **dict.fromkeys(("left_pad", "right_pad"), _STEEL),
                "stem": (0.93, 0.93, 0.90, 1.0),
            },
        ),
    )
}
"""Every look by name; ``"first"`` is what ``Prophet-Tabletop-v0`` has learned."""
