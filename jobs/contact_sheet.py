"""A contact sheet: some images of every split and group of a labelled set, with the outlines of their masks."""

import io
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from jobs.contract import InspectConfig
from jobs.labelled import Sample
from jobs.overlays import outline, thumbnail
from jobs.samples import Encoded, readers
from unetpp.errors import ImageError

NUM_IMAGES, NUM_COLUMNS = 24, 6
CELL_PX, CAPTION_PX, GAP_PX = 240, 30, 8
PAPER, INK = (255, 255, 255), (32, 32, 32)


def choose(samples: Sequence[Sample], group_by: str | None) -> list[Sample]:
    """At most NUM_IMAGES samples: as many of every split and group, spread over each, in the order of those."""
    buckets: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        group = sample.group(group_by) if group_by else ""
        buckets.setdefault((sample.split, group), []).append(sample)
    ordered = [_spread(buckets[key]) for key in sorted(buckets)]
    taken = [sample for turn in zip_longest(*ordered) for sample in turn if sample is not None][:NUM_IMAGES]
    chosen = {sample.id for sample in taken}
    return [sample for key in sorted(buckets) for sample in buckets[key] if sample.id in chosen]


def _spread(samples: list[Sample]) -> list[Sample]:
    """At most NUM_IMAGES samples at equal distances, those first that lie far apart."""
    positions = np.linspace(0, len(samples) - 1, min(len(samples), NUM_IMAGES)).astype(int).tolist()
    far_to_near = dict.fromkeys(position for step in (12, 6, 3, 2, 1) for position in positions[::step])
    return [samples[position] for position in far_to_near]


def contact_sheet(samples: Sequence[Sample], config: InspectConfig, group_by: str | None) -> bytes:
    """PNG bytes of the sheet. What cannot be decoded is a cell that says so."""
    num_columns = min(NUM_COLUMNS, max(1, len(samples)))
    num_rows = max(1, -(-len(samples) // num_columns))
    pitch_x, pitch_y = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Pillow.new("RGB", (num_columns * pitch_x + GAP_PX, num_rows * pitch_y + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for position, read in readers(samples):
        x, y = GAP_PX + position % num_columns * pitch_x, GAP_PX + position // num_columns * pitch_y
        sample = samples[position]
        try:
            cell, fault = _cell(read(), config)
            sheet.paste(cell, (x + (CELL_PX - cell.width) // 2, y + (CELL_PX - cell.height) // 2))
        except ImageError as error:
            fault = error.detail
            draw.rectangle((x, y, x + CELL_PX, y + CELL_PX), outline=INK)
        group = sample.group(group_by) if group_by else ""
        caption = "  ".join(part for part in (sample.split, group, fault) if part)
        draw.text((x, y + CELL_PX + 2), _cut(caption, font), fill=INK, font=font)
        draw.text((x, y + CELL_PX + 15), _cut(sample.id, font), fill=INK, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _cell(encoded: Encoded, config: InspectConfig) -> tuple[Pillow.Image, str]:
    """The image with its mask's outline, and what keeps the outline away."""
    image_HWC = encoded.image_HWC(config.bands)
    cell = thumbnail(image_HWC, CELL_PX)
    try:
        mask_HW = encoded.mask_HW(config.num_classes, config.ignore_index)
    except ImageError as error:
        return cell, f"mask: {error.detail}"
    if mask_HW.shape != image_HWC.shape[:2]:
        return cell, f"mask of {mask_HW.shape[0]} x {mask_HW.shape[1]}"
    lines = outline(mask_HW, cell.size)
    cell.paste(lines, (0, 0), lines)
    return cell, ""


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as there is room for under a cell."""
    while text and font.getlength(text) > CELL_PX:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text
