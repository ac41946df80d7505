"""A picture of how many tokens each expert of each layer received."""

from __future__ import annotations

import torch

CELL = 16  # width and height of an expert's square in pixels
# Colours by load relative to the fair share: dark blue for unused, white for balanced, red for three times and more.
COLOURS = (
    (0.0, (8, 29, 88)),
    (0.5, (103, 169, 207)),
    (1.0, (247, 247, 247)),
    (2.0, (239, 138, 98)),
    (3.0, (178, 24, 43)),
)
LEGEND = (
    "A row for each layer (the first on top), a column for each expert. White: the fair share of the tokens; "
    "dark blue: none; red: three times the fair share or more."
)


def load_image(load: torch.Tensor) -> torch.Tensor:
    """Draw expert loads `[L, E]` (token counts) as a picture, uint8 `[3, 16 L, 16 E]`."""
    share = load / load.mean(-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    stops = torch.tensor([stop for stop, _ in COLOURS], dtype=share.dtype)
    colours = torch.tensor([colour for _, colour in COLOURS], dtype=share.dtype)
    share = share.nan_to_num(0.0).clamp(max=stops[-1].item())
    right = torch.searchsorted(stops, share).clamp(1, len(stops) - 1)
    weight = ((share - stops[right - 1]) / (stops[right] - stops[right - 1])).unsqueeze(-1)
    pixels = torch.lerp(colours[right - 1], colours[right], weight).round().to(torch.uint8)
    return pixels.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1).permute(2, 0, 1)
