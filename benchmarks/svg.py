"""A few lines of SVG: shapes on a white sheet, one font, no script and no style sheet."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

INK = "#1f2933"
FAINT = "#d9dee3"
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


class Sheet:
    """A picture of `width` by `height` points. Shapes lie on top of those drawn before."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
            f' width="{width}" height="{height}" font-family="{escape(FONT)}" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: str = "start",
        size: int = 13,
        bold: bool = False,
        color: str = INK,
    ) -> None:
        """Write `words`. anchor: which part of them stands at x: start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fill a rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{color}"/>'
        )

    def dot(self, x: float, y: float, color: str = INK) -> None:
        """Mark a point."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}" fill-opacity="0.75"/>')

    def line(self, points: Sequence[tuple[float, float]], color: str = FAINT, width: float = 1) -> None:
        """Join points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"'
            ' stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def finished(self) -> str:
        """Return the file's text."""
        return "\n".join([*self._parts, "</svg>", ""])
