"""The colours of all pictures.

From the palette of Okabe and Ito, which is told apart with any kind of colour vision (Wong, Nature Methods 8, 441, 2011).
Where a rank runs several stages, the later are lighter.
"""

from __future__ import annotations

from lightning_par.pipeline.action import Kind

COLOURS: dict[Kind, str] = {"F": "#0072B2", "B": "#D55E00", "I": "#E69F00", "W": "#009E73"}
NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
HUES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")  # of pp coordinates: neighbours differ
LIGHTEST = 0.6  # share of white in the lightest tint, at most


def tint(kind: Kind, position: int, count: int) -> str:
    """The colour of an action.

    Args:
        kind: of the action.
        position: of its stage among the stages of its rank.
        count: of those stages.
    """
    white = LIGHTEST * position / count
    red, green, blue = (int(COLOURS[kind][place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in (red, green, blue))


def hue(pp: int) -> str:
    """The colour of the ranks at a pp coordinate; the eighth has that of the first."""
    return HUES[pp % len(HUES)]


def ink(colour: str) -> str:
    """Black or white, whichever is read better on ``colour``: by its relative luminance (WCAG 2.1)."""
    linear = [(int(colour[place : place + 2], 16) / 255) ** 2.2 for place in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"
