"""Identify the format of a file by its bytes, among the formats that are decoded."""

from __future__ import annotations

import functools
import io
import logging

from PIL import Image, ImageFile

from captioner.imaging.error_codes import ImageError, code_of, one_line

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
        return ImageError("unsupported_format", f"{name} files are not decoded", format=name.lower())
    if failure:
        name, error = failure
        return ImageError(code_of(error, data), one_line(error), format=name.lower())
    return ImageError("not_an_image", f"no known image format; the file begins with {data[:12]!r}")


def why_not_an_image(head: bytes) -> ImageError | None:
    """Return why a file that begins with these bytes, 4 KiB at least, is no image; None where it may be one.

    Nothing is parsed but signatures, so that it is safe outside the sandbox.
    """
    accepted = any(accepts and accepts(head[:_PREFIX]) for _, accepts in (Image.OPEN[n] for n in available_formats()))
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
