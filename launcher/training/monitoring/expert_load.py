"""Which experts of which layers the tokens went to, as a picture."""

from __future__ import annotations

import torch

CELL = 16  # pixels
# Load over the fair share, and its colour: unused dark blue, balanced white, three times as busy and more red.
COLOURS = (
    (0.0, (8, 29, 88)),
    (0.5, (103, 169, 207)),
    (1.0, (247, 247, 247)),
    (2.0, (239, 138, 98)),
    (3.0, (178, 24, 43)),
)
LEGEND = (
    "A row for each layer (the first on top), a column for each expert. White: its fair share of the tokens; "
    "dark blue: none; red: three times its share or more."
)


def load_image(load: torch.Tensor) -> torch.Tensor:
    """Expert loads `[L, E]` (counts) as a picture, uint8 `[3, 16 L, 16 E]`."""
    share = load / load.mean(-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    stops = torch.tensor([stop for stop, _ in COLOURS], dtype=share.dtype)
    colours = torch.tensor([colour for _, colour in COLOURS], dtype=share.dtype)
    share = share.nan_to_num(0.0).clamp(max=stops[-1].item())
    right = torch.searchsorted(stops, share).clamp(1, len(stops) - 1)
    weight = ((share - stops[right - 1]) / (stops[right] - stops[right - 1])).unsqueeze(-1)
    pixels = torch.lerp(colours[right - 1], colours[right], weight).round().to(torch.uint8)
    return pixels.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1).permute(2, 0, 1)
