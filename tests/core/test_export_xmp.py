"""XMP: our fields go in, everything else stays to the byte, and a person's text is never replaced."""

import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import caption_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import AltTextConfig, ExportConfig
from captioner.errors import UsageError
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.exports.command import export_texts
from captioner.publishing.exports.embedded import is_signed
from captioner.publishing.exports.select import Tally
from captioner.publishing.exports.xmp import merge_text
from captioner.publishing.exports.xmp_packet import ALT_TEXT, CAPTION_WRITER, EXTENDED, XmpError, parse
from captioner.store.journal import Journal, Review
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder

LIGHTROOM = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
   xmp:Rating="5" crs:Look='a &amp; "b"'>
   <!-- kept -->
   <dc:subject><rdf:Bag><rdf:li>harbour</rdf:li></rdf:Bag></dc:subject>
   <crs:Empty/>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>""".encode()
THEIRS = LIGHTROOM.replace(
    b"<crs:Empty/>",
    b'<i:AltTextAccessibility xmlns:i="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"><rdf:Alt>'
    b'<rdf:li xml:lang="nb">En havn</rdf:li></rdf:Alt></i:AltTextAccessibility>',
)
BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><x>&b;&b;&b;</x>'


def row(**changes: Any) -> dict[str, Any]:
    values = dict.fromkeys(("model_revision", "training_run_id", "reviewed_at", "created_at"), None)
    values |= {"image_id": "a.png", "uri": "a.png", "alt_text": "A boat.", "caption": "a boat", "language": "en"}
    values |= {"review_status": "approved", "reviewer": "Ada", "text_by": "machine", "model": "m", "model_sha256": "s"}
    return values | {"run_id": "r"} | changes


def everything_in(packet: bytes) -> dict[str, dict[str, str]]:
    return {p.name: p.values for description in parse(packet).descriptions for p in description.properties}


xml_texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(str.strip)


@given(st.sampled_from([None, LIGHTROOM]), xml_texts, xml_texts)
def test_what_goes_in_comes_out_and_all_else_stays(existing: bytes | None, first: str, second: str) -> None:
    before = everything_in(existing) if existing else {}

    once = merge_text(existing, row(alt_text=first), "(auto)", update=False)
    twice = merge_text(once, row(alt_text=second), "(auto)", update=True)

    for packet, text in ((once, first), (twice, second)):
        ET.fromstring(packet)
        properties = everything_in(packet)
        assert {name: properties[name] for name in before} == before
        assert properties[ALT_TEXT] == {"x-default": text, "en": text}
    assert b"<!-- kept -->" in twice or existing is None
    assert merge_text(twice, row(alt_text=second), "(auto)", update=True) == twice


def test_a_text_by_somebody_else_stays() -> None:
    with pytest.raises(XmpError, match="somebody else"):
        merge_text(THEIRS, row(), "(auto)", update=True)

    ours = merge_text(LIGHTROOM, row(), "(auto)", update=False)
    with pytest.raises(XmpError, match="somebody else"):
        merge_text(ours.replace(b">A boat.</rdf:li>", b">A better text.</rdf:li>"), row(), "(auto)", update=True)
    norwegian = '<rdf:li xml:lang="nb">En båt</rdf:li></rdf:Alt>'.encode()
    translated = ours.replace(b"</rdf:Alt>", norwegian)
    assert translated != ours
    with pytest.raises(XmpError, match="somebody else"):
        merge_text(translated, row(), "(auto)", update=True)


def test_the_writer_of_an_existing_description_stays() -> None:
    named = LIGHTROOM.replace(
        b"<crs:Empty/>", b'<p:CaptionWriter xmlns:p="http://ns.adobe.com/photoshop/1.0/">Bea</p:CaptionWriter>'
    )

    packet = parse(merge_text(named, row(), "(auto)", update=False))

    assert packet.value(CAPTION_WRITER) == "Bea"
    assert packet.own_field("Writer") == "Machine: m (approved by Ada)"


def test_it_never_says_that_the_image_is_machine_made() -> None:
    assert b"DigitalSourceType" not in merge_text(None, row(), "(auto)", update=False)


def test_an_extended_description_only_where_everything_is_called_automatic() -> None:
    long = "a boat in a harbour. " + "there are many more boats behind it. " * 5
    unreviewed = row(caption=long, review_status="unreviewed", alt_text="A boat in a harbour. (auto)")

    assert parse(merge_text(None, row(caption=long), "(auto)", update=False)).value(EXTENDED) is None
    extended = parse(merge_text(None, unreviewed, "(auto)", update=False)).value(EXTENDED)
    assert extended is not None
    assert extended.endswith("behind it. (auto)")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOMB, "document type declaration"),
        (b"<x", "not well-formed"),
        (b"", "not well-formed"),
        (b"<a/>", "no rdf:RDF"),
        ('<?xml version="1.0" encoding="UTF-16"?><a/>'.encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_no_sidecar_is_left_alone(data: bytes, message: str) -> None:
    with pytest.raises(XmpError, match=message):
        merge_text(data, row(), "(auto)", update=True)


@pytest.fixture
def table(tmp_path: Path) -> CaptionsTable:
    archive = make_folder(tmp_path / "archive", 6)
    pipeline.run(caption_config(archive, tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    make_alt_texts(table, AltTextConfig(language="en"))
    decide(table, "approved", 0, 1, 2, 3)
    return table


def decide(table: CaptionsTable, decision: Any, *numbers: int) -> None:
    with Journal(table.directory, "Ada") as journal:
        journal.append(Review(decision, tuple(f"{number:06d}.png" for number in numbers), None, "Ada"))


def export(table: CaptionsTable, path: str = "", **settings: Any) -> Tally:
    return export_texts(table, ExportConfig(to="xmp", path=path, **settings))


def test_sidecars_beside_the_originals(table: CaptionsTable, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    (archive / "000000.xmp").write_bytes(LIGHTROOM)
    (archive / "000001.png.xmp").write_bytes(LIGHTROOM)  # darktable's way of naming
    (archive / "000002.xmp").write_bytes(THEIRS)
    (archive / "000003.xmp").write_bytes(BOMB)

    tally = export(table, beside_originals=True)

    assert parse((archive / "000000.xmp").read_bytes()).value(ALT_TEXT)
    assert parse((archive / "000001.png.xmp").read_bytes()).value(ALT_TEXT)
    assert not (archive / "000001.xmp").exists()
    assert (archive / "000002.xmp").read_bytes() == THEIRS
    assert (archive / "000003.xmp").read_bytes() == BOMB
    assert [name for name, _ in tally.problems] == ["000002.png", "000003.png"]


def test_update_takes_back_what_was_rejected_since(table: CaptionsTable, tmp_path: Path) -> None:
    dest = tmp_path / "sidecars"
    export(table, str(dest))
    rating = b' <rdf:Description rdf:about="" x:Rating="4" xmlns:x="urn:x#"/> </rdf:RDF>'
    sidecar = dest / "000001.xmp"
    sidecar.write_bytes(sidecar.read_bytes().replace(b" </rdf:RDF>", rating))
    decide(table, "rejected", 0, 1)
    decide(table, "approved", 4)

    tally = export(table, str(dest), update=True)

    assert tally.withdrawn == 2
    assert not (dest / "000000.xmp").exists()
    assert everything_in((dest / "000001.xmp").read_bytes()) == {"urn:x# Rating": {"": "4"}}
    assert parse((dest / "000004.xmp").read_bytes()).own_field("Status") == "approved"


needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="ExifTool is not installed")


@needs_exiftool
def test_embedding_goes_into_copies_and_changes_no_pixel(table: CaptionsTable, tmp_path: Path) -> None:
    image = tmp_path / "archive/000000.png"
    with_xmp = subprocess.run(["exiftool", "-overwrite_original", "-XMP-xmp:Rating=4", str(image)], capture_output=True)
    assert with_xmp.returncode == 0
    signed = tmp_path / "archive/000001.png"
    signed.write_bytes(signed.read_bytes() + b"....jumb....c2pa")
    before = {path.name: path.read_bytes() for path in (tmp_path / "archive").iterdir()}

    tally = export(table, str(tmp_path / "copies"), embed=True)

    assert {path.name: path.read_bytes() for path in (tmp_path / "archive").iterdir()} == before
    copies = tmp_path / "copies"
    assert sorted(path.name for path in copies.glob("*.png")) == ["000000.png", "000002.png", "000003.png"]
    assert tally.problems == [("000001.png", "it has a C2PA signature, which embedding breaks (--allow-c2pa)")]
    tags = ["-s3", "-XMP-iptcCore:AltTextAccessibility-en", "-XMP-photoshop:CaptionWriter", "-XMP-xmp:Rating"]
    shown = subprocess.run(["exiftool", *tags, str(copies / "000000.png")], capture_output=True, text=True).stdout
    assert shown.splitlines()[1:] == ["Machine: fake (approved by Ada)", "4"]
    assert shown.splitlines()[0].endswith(".")
    for name in ("000000.png", "000002.png"):
        assert np.array_equal(
            np.asarray(Image.open(copies / name)), np.asarray(Image.open(tmp_path / "archive" / name))
        )
    assert is_signed(before["000001.png"])


@needs_exiftool
def test_a_signature_is_broken_only_when_told(table: CaptionsTable, tmp_path: Path) -> None:
    signed = tmp_path / "archive/000001.png"
    signed.write_bytes(signed.read_bytes() + b"....jumb....c2pa")

    export(table, str(tmp_path / "copies"), embed=True, allow_c2pa=True)

    assert (tmp_path / "copies/000001.png").exists()


def test_without_exiftool_embedding_says_so(
    table: CaptionsTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(UsageError, match="libimage-exiftool-perl"):
        export(table, str(tmp_path / "copies"), embed=True)

    assert not (tmp_path / "copies").exists()
