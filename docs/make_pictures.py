"""Make the pictures of the README: `python docs/make_pictures.py OUT ARCHIVE`, from a captioned table."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS, SIDE, TEXT = 4, 2, 240, 74


def contact_sheet(rows: list[dict], archive: Path) -> Image.Image:
    """Pictures with the captions that the table holds for them."""
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 16) + 16, ROWS * (SIDE + TEXT) + 16), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, row in enumerate(rows[: COLUMNS * ROWS]):
        left, top = 16 + number % COLUMNS * (SIDE + 16), 16 + number // COLUMNS * (SIDE + TEXT)
        with Image.open(archive / row["image_id"]) as picture:
            sheet.paste(picture.resize((SIDE, SIDE)), (left, top))
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="#888888")
        text = "\n".join(textwrap.wrap(row["caption"], 36))
        draw.multiline_text((left, top + SIDE + 4), text, fill="black", font=font)
    return sheet


def main(out: Path, archive: Path) -> None:
    rows = pq.read_table(out / "captions", columns=["image_id", "caption"]).to_pylist()
    contact_sheet(rows[3:], archive).save(Path(__file__).parent / "contact-sheet.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
