"""Draw the README's picture.

    flashsim run scenarios/h100-forward.toml --json | python docs/picture.py > docs/h100-forward.svg

Lines are predictions, dots are published measurements, both in TFLOP/s over the sequence length.
"""

from __future__ import annotations

import json
import sys
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 250, 56, 48, 60
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOP_TFLOPS = 800
COLORS = {"fa3": "#0b6e4f", "fa2": "#1f5fa8", "standard": "#8a8a8a"}
NAMES = {"fa3": "FlashAttention-3", "fa2": "FlashAttention-2", "standard": "standard attention"}
PANELS = ((64, "full"), (128, "causal"))
"""(head dim, mask) for which the FlashAttention-3 paper's figures are in the calibration rows."""


def x(length: int) -> float:
    return WIDTH * LENGTHS.index(length) / (len(LENGTHS) - 1)


def y(tflops: float) -> float:
    return HEIGHT * (1 - tflops / TOP_TFLOPS)


def panel(cases: list[dict[str, Any]], head_dim: int, mask: str) -> list[str]:
    lines = [f'<text x="0" y="-14" class="title">head dim {head_dim}, {mask} mask</text>']
    for tflops in range(0, TOP_TFLOPS + 1, 200):
        lines.append(f'<path d="M0 {y(tflops):.0f}H{WIDTH}" class="grid"/>')
        lines.append(f'<text x="-8" y="{y(tflops) + 4:.0f}" text-anchor="end">{tflops}</text>')
    for length in LENGTHS:
        label = f"{length // 1024}k" if length >= 1024 else str(length)
        lines.append(f'<text x="{x(length):.0f}" y="{HEIGHT + 20}" text-anchor="middle">{label}</text>')
    for schedule, color in COLORS.items():
        mine = [
            (c["case"]["seqlen"], c["result"]["tflops"], (c["measured"] or {}).get("tflops"))
            for c in cases
            if (c["case"]["schedule"], c["case"]["head_dim"], c["case"]["mask"]) == (schedule, head_dim, mask)
        ]
        points = " ".join(f"{x(length):.1f},{y(predicted):.1f}" for length, predicted, _ in mine)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for length, _, measured in mine:
            if measured:
                lines.append(f'<circle cx="{x(length):.1f}" cy="{y(measured):.1f}" r="4" fill="{color}"/>')
    return lines


def main() -> None:
    cases = json.load(sys.stdin)["cases"]
    width, height = LEFT + 2 * WIDTH + GAP + 60, TOP + HEIGHT + 110
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.grid{stroke:#ddd}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (head_dim, mask) in enumerate(PANELS):
        out.append(f'<g transform="translate({LEFT + number * (WIDTH + GAP + 20)},{TOP})">')
        out += [*panel(cases, head_dim, mask), "</g>"]
    clock = cases[0]["result"]["clock_mhz"]
    captions = (
        f"H100 SXM5, forward, fp16, 16k tokens: TFLOP/s over sequence length. Lines: predicted at {clock:.0f} MHz.",
        "Dots: published (arXiv 2407.08608, figure 5); a power cap held that clock lower, to what is unknown.",
    )
    for number, caption in enumerate(captions):
        out.append(f'<text x="{LEFT}" y="{TOP + HEIGHT + 44 + 18 * number}">{caption}</text>')
    for number, (schedule, color) in enumerate(COLORS.items()):
        left, top = LEFT + 180 * number, TOP + HEIGHT + 90
        out.append(f'<path d="M{left} {top - 4}h24" stroke="{color}" stroke-width="3"/>')
        out.append(f'<text x="{left + 32}" y="{top}">{NAMES[schedule]}</text>')
    sys.stdout.write("\n".join([*out, "</svg>", ""]))


if __name__ == "__main__":
    main()
