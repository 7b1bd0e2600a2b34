"""Read thumbnails for the page from the source, by the rows of the plan."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from captioner.config import SourceConfig
from captioner.data import Chunk
from captioner.errors import CaptionerError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.sources import reopen_source
from captioner.sources.reading import read_images
from captioner.store.plan import read_planned
from captioner.store.table import CaptionsTable

SIDE = 224  # pixels, of the longer side
MAX_BYTES = 3_500_000  # all images of a page as base64, so that the page stays below 5 MB
MAX_PIXELS = 100_000_000


def thumbnails(table: CaptionsTable, shown: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """Return data URIs by image id, and why images are missing ("" when the source could be read).

    `shown`: rows with `image_id`, `chunk_id`, `chunk_row`. Images that cannot be read or decoded are left out.
    """
    by_chunk: dict[str, dict[int, str]] = defaultdict(dict)
    for row in shown:
        by_chunk[row["chunk_id"]][row["chunk_row"]] = row["image_id"]
    uris: dict[str, str] = {}
    try:
        config = SourceConfig.model_validate(table.info["source"])
        source = reopen_source(table.info["source"])
        with GuardedDecoder(SIDE, MAX_PIXELS, config.decode_timeout) as decoder:
            for chunk_id, rows in by_chunk.items():
                planned = read_planned(table, Chunk.from_id(chunk_id)).take(pa.array(sorted(rows)))
                readable = {raw.image_id: raw.data for raw in read_images(source, planned) if raw.data is not None}
                for image_id, decoded in zip(readable, decoder(readable.values()), strict=True):
                    if decoded.pixels is not None:
                        uris[image_id] = data_uri(decoded.pixels, decoded.width, decoded.height)
    except (CaptionerError, OSError) as error:
        return uris, f"images could not be read from the source: {error}"
    return uris, ""


def data_uri(square: npt.NDArray[np.uint8], width: int, height: int) -> str:
    """Return the square pixels as a JPEG in the image's own aspect ratio."""
    scale = min(1.0, SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    buffer = io.BytesIO()
    Image.fromarray(square).resize(size).save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
