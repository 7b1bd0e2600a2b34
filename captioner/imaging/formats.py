"""Identify the format of a file by its bytes, and open it at a smaller size where its format allows that.

    JPEG        2, 4 or 8 times smaller, from the first coefficients of each block
    JPEG 2000   2, 4, 8 ... times smaller: its lower resolution levels
    TIFF        the copies that pyramids and cloud-optimised files hold

Memory and most of the time are then those of the small image, so `max_pixels` is compared with its size. But a
progressive JPEG keeps all its coefficients until its end, whatever the size it is read at.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from dataclasses import dataclass

from PIL import Image, ImageFile

from captioner.imaging.pillow import ImageError, code_of, one_line
from captioner.imaging.tiff import extract, find_overview

# Formats that Pillow decodes without other programs, in the order they are tried: frequent ones first, those without a
# signature last. Left out: EPS and WMF start other programs; IPTC opens its content as any format, EPS too; BUFR, GRIB,
# HDF5 and MPEG are recognised but have no decoder.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JPEG2000"),
    *("ICO", "CUR", "ICNS", "PPM", "PSD", "DIB", "DDS", "QOI", "SGI", "SUN", "PCX", "DCX", "MSP", "XBM", "XPM"),
    *("BLP", "FITS", "FLI", "FTEX", "GBR", "MCIDAS", "PIXAR", "XVTHUMB"),
    *("TGA", "IM", "IMT", "PCD", "SPIDER"),
)

# Image formats that are not decoded: name, offset of the signature, signature.
_UNSUPPORTED = (
    ("EPS", 0, b"%!PS"),
    ("EPS", 0, b"\xc5\xd0\xd3\xc6"),
    ("WMF", 0, b"\xd7\xcd\xc6\x9a"),
    ("WMF", 0, b"\x01\x00\x09\x00\x00\x03"),
    ("EMF", 40, b" EMF"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 0, b"\x00\x00\x00\x0cJXL "),
    ("JPEG XR", 0, b"II\xbc\x01"),
    ("OpenEXR", 0, b"v/1\x01"),
    ("Radiance HDR", 0, b"#?RADIANCE"),
    ("XCF", 0, b"gimp xcf"),
    ("DjVu", 0, b"AT&TFORM"),
    ("Canon CR3", 4, b"ftypcrx "),
    ("Fujifilm RAF", 0, b"FUJIFILMCCD-RAW"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PREFIX = 16  # bytes that Pillow's plugins look at
_PDF_HEAD, _SVG_HEAD = 1024, 4096
_CODESTREAM, _CODING_STYLE = b"\xff\x4f\xff\x51", 0x52  # JPEG 2000: SOC and SIZ; COD


def identify(data: bytes) -> ImageFile.ImageFile:
    """Open a file by its content, reading headers only. Raises ImageError.

    This is the loop of `Image.open`, but it keeps the error of the format whose signature matched: a file cut off in
    its header is truncated, not unknown.
    """
    failure: tuple[str, Exception] | None = None
    for name in available_formats():
        factory, accepts = Image.OPEN[name]
        try:
            is_accepted = True if accepts is None else accepts(data[:_PREFIX])
            if isinstance(is_accepted, str):  # why the format is not supported
                raise NotImplementedError(is_accepted)
            if is_accepted:
                return factory(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:
            raise ImageError("too_many_pixels", one_line(error), format=name.lower()) from error
        except Exception as error:
            if accepts is not None and failure is None:
                failure = name, error
    raise _unidentified(data, failure)


@functools.cache
def available_formats() -> tuple[str, ...]:
    """Return the FORMATS that this installation of Pillow decodes; HEIF with the extra `heif`."""
    logging.getLogger("PIL").addHandler(
        logging.NullHandler()
    )  # else its errors go to stderr where logging is not set up
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(data: bytes, failure: tuple[str, Exception] | None) -> ImageError:
    name = _unsupported_name(data)
    if name == "HEIF":
        return ImageError("unsupported_format", "HEIF needs the extra: pip install 'captioner[heif]'", format="heif")
    if name:
        return ImageError("unsupported_format", f"the format {name} is not supported", format=name.lower())
    if failure:
        name, error = failure
        return ImageError(code_of(error, data), one_line(error), format=name.lower())
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return ImageError("not_an_image", "a pointer of Git LFS, without the image; fetch that with `git lfs pull`")
    return ImageError("not_an_image", f"no known image format; the file begins with {data[:12]!r}")


def why_not_an_image(head: bytes) -> ImageError | None:
    """Return why a file that begins with these bytes, 4 KiB or all of it, is not an image; None where it may be one.

    Nothing is parsed but signatures, so that it is safe outside the sandbox.
    """
    prefix = head[:_PREFIX].ljust(_PREFIX, b"\0")  # Pillow's functions fail on a file of few bytes
    accepted = any(accepts and accepts(prefix) for _, accepts in (Image.OPEN[n] for n in available_formats()))
    if accepted or _may_be_without_signature(head):
        return None
    return _unidentified(head, None)


def _may_be_without_signature(head: bytes) -> bool:
    """Return whether this may be an image of a format that has no signature at its beginning: TGA, IM, PhotoCD."""
    is_tga = head[1:2] in (b"\0", b"\1") and head[2:3] in (b"\1", b"\2", b"\3", b"\x09", b"\x0a", b"\x0b")
    is_tga = is_tga and head[16:17] in (b"\1", b"\x08", b"\x0f", b"\x10", b"\x18", b"\x20")
    return is_tga or b"Image type" in head[:100] or head[2048:2052] == b"PCD_"


def _unsupported_name(data: bytes) -> str:
    for name, offset, signature in _UNSUPPORTED:
        if data.startswith(signature, offset):
            return name
    if "HEIF" not in available_formats() and _is_heif(data):
        return "HEIF"
    if b"%PDF-" in data[:_PDF_HEAD]:
        return "PDF"
    return "SVG" if _is_svg(data[:_SVG_HEAD].lower()) else ""


def _is_heif(data: bytes) -> bool:
    brands = data[8 : int.from_bytes(data[:4], "big")]
    return data[4:8] == b"ftyp" and brands[:4] in _HEIF_BRANDS and b"avif" not in brands and b"avis" not in brands


def _is_svg(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and b"<svg" in head and b"<html" not in head


@dataclass(frozen=True, slots=True)
class Reduced:
    """A file that will load smaller.

    `extent`: width and height that the image then has, not rounded to whole pixels; `None`: all of the image.
    `in_memory`: how many pixels are held while it loads.
    """

    file: ImageFile.ImageFile
    extent: tuple[float, float] | None
    in_memory: int


def open_reduced(file: ImageFile.ImageFile, data: bytes, needed_side: int) -> Reduced | None:
    """Open the smallest size with both sides >= needed_side; return None where there is only the whole image.

    Of a JPEG the result holds `file` itself, changed; of other formats another file.
    """
    if file.format == "JPEG":
        return _open_jpeg(file, needed_side)
    if file.format == "JPEG2000":
        return _open_jpeg2000(data, needed_side)
    return _open_tiff(data, needed_side) if file.format == "TIFF" else None


def _open_jpeg(file: ImageFile.ImageFile, needed_side: int) -> Reduced | None:
    whole = file.size
    drafted = file.draft("RGB", (needed_side, needed_side))
    if not drafted or file.size == whole:
        return None
    held_size = whole if file.info.get("progressive") else file.size
    return Reduced(file, drafted[1][2:], math.prod(held_size))


def _open_jpeg2000(data: bytes, needed_side: int) -> Reduced | None:
    file = identify(data)
    width, height = file.size
    halvings = min(_resolution_levels(data), int(math.log2(max(1.0, min(file.size) / needed_side))))
    if not halvings:
        return None
    power = 1 << halvings
    size = -(-width // power), -(-height // power)
    # The standard rounds up, Pillow to the nearest: this size is rounded alike by both.
    file._size = size[0] * power, size[1] * power
    file.reduce = halvings  # type: ignore[method-assign, assignment]
    return Reduced(file, (width / power, height / power), math.prod(size))


def _resolution_levels(data: bytes) -> int:
    """Return how often a JPEG 2000 image can be halved, from its main header (ISO 15444-1, A.6.1)."""
    offset = data.find(_CODESTREAM, 0, 1 << 20) + 2
    while offset >= 2 and offset + 10 <= len(data) and data[offset] == 0xFF:
        if data[offset + 1] == _CODING_STYLE:
            return data[offset + 9]
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 0


def _open_tiff(data: bytes, needed_side: int) -> Reduced | None:
    overview = find_overview(data, needed_side)
    if overview is None:
        return None
    try:
        file = identify(extract(data, overview.offset, like_first=True))
    except (ImageError, ValueError):
        return None  # the whole page may still be decodable
    return Reduced(file, None, math.prod(file.size))
