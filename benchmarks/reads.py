"""Reading pictures from a store that answers late: what `--read-concurrency` brings.

    python -m benchmarks.reads --images DIR [--latency 30] [--pictures 512] [--concurrency 1,8,32,64]
    python -m benchmarks.reads --images DIR --pictures 10240 --concurrency 32 --errors 0.01 --stalls 0.001 [--work 5.3]

A server of its own process speaks as much of the S3 protocol as reading needs and waits --latency milliseconds before
each answer; a picture takes two of them. The pictures are read as a decode worker reads its chunk. The last line is one
JSON object of pictures a second, medians of the rounds.

--errors, --stalls: the same is then read from a second server, which answers this share of the requests with 503, or
after --stall-seconds, in turns with the first one; "share" is its rate as a share of the other's, median of the rounds.
"second_reads" are the reads that were late and were started again, for each picture.
--work: milliseconds for each picture that the reader is busy with a chunk while the next one is read, as a decoder is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from captioner.data import RawImage

BUCKET = "pictures"
CHUNK = 512


def main() -> None:
    options = _options()
    photos = sorted(Path(options.images).rglob("*.jpg"))
    files = {f"{number:06d}.jpg": photos[number % len(photos)] for number in range(options.pictures)}
    result: dict[str, dict[str, float]] = {}
    healthy = Faults(options.latency / 1000)
    faulty = Faults(options.latency / 1000, options.errors, options.stalls, options.stall_seconds)
    with serving(files, healthy) as port, serving(files, faulty) as faulty_port:
        ports = [port, faulty_port] if faulty != healthy else [port]
        for concurrency in map(int, options.concurrency.split(",")):
            rounds = [
                [_read(_location(port), list(files), concurrency, options.work / 1000) for port in ports]
                for _ in range(options.rounds)
            ]
            rates = [[rate for rate, _ in each] for each in rounds]
            facts = {"pictures_per_second": round(statistics.median(each[0] for each in rates), 1)}
            facts["second_reads"] = round(statistics.mean(each[0][1] for each in rounds), 5)
            print(f"{concurrency} reads at once:", [[round(rate, 1) for rate in each] for each in rates], flush=True)
            if len(ports) > 1:
                facts["with_faults"] = round(statistics.median(each[1] for each in rates), 1)
                facts["share"] = round(statistics.median(each[1] / each[0] for each in rates), 3)
                facts["second_reads_with_faults"] = round(statistics.mean(each[1][1] for each in rounds), 5)
            result[str(concurrency)] = facts
    print(json.dumps({"latency_ms": options.latency, "pictures": options.pictures, "read_concurrency": result}))


@dataclass(frozen=True)
class Faults:
    """How a server answers: after so many seconds; a share of the requests with an error, a share much later."""

    latency: float
    errors: float = 0.0
    stalls: float = 0.0
    stall_seconds: float = 60.0


def _location(port: int) -> str:
    return f"s3://{BUCKET}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--latency", type=float, default=30, help="milliseconds before each answer")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--errors", type=float, default=0.0)
    parser.add_argument("--stalls", type=float, default=0.0)
    parser.add_argument("--stall-seconds", type=float, default=60.0)
    parser.add_argument("--work", type=float, default=0.0)
    return parser.parse_args()


def _read(location: str, names: list[str], concurrency: int, work: float) -> tuple[float, float]:
    """Pictures a second, read in chunks of 512, and second reads for each picture.

    `work`: seconds for each picture that follow reading.
    """
    import pyarrow as pa

    from captioner.run.prefetch import one_ahead
    from captioner.sources import reading
    from captioner.sources.reading import read_rows, reads_at_once
    from captioner.sources.root import Root

    count = len(names)
    rows = pa.table({"image_id": names, "file": [name.encode() for name in names]})
    rows = rows.append_column("offset", pa.nulls(count, pa.int64())).append_column("size", pa.nulls(count, pa.int64()))
    started = time.perf_counter()

    def read(first: int) -> list[RawImage]:
        with reads_at_once(concurrency):
            return read_rows(rows.slice(first, CHUNK), Root.at(location))

    with (
        mock.patch.object(reading, "in_background", wraps=reading.in_background) as second,
        one_ahead(read(first) for first in range(0, count, CHUNK)) as chunks,
    ):
        for images in chunks:
            assert all(image.data for image in images), next(image.error_message for image in images if not image.data)
            time.sleep(work * len(images))
    return count / (time.perf_counter() - started), second.call_count / count


@contextmanager
def serving(files: dict[str, Path], faults: Faults) -> Iterator[int]:
    """A store of these objects on a port of this machine. Its keys are in the environment meanwhile."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(files, faults, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(files: dict[str, Path], faults: Faults, connection: Connection) -> None:
    chance = random.Random(0)
    objects = {f"/{BUCKET}/{name}": path.read_bytes() for name, path in files.items()}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                draw = chance.random()
                await asyncio.sleep(faults.stall_seconds if draw < faults.stalls else faults.latency)
                if faults.stalls <= draw < faults.stalls + faults.errors:
                    writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
                else:
                    writer.writelines(_answer(objects, request.decode("latin-1")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def _answer(objects: dict[str, bytes], request: str) -> list[bytes]:
    """HEAD and GET of an object, whole or a range of it."""
    first, *lines = request.split("\r\n")
    method, target, _ = first.split()
    data = objects.get(target.partition("?")[0])
    if data is None:
        return [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    start, end = 0, len(data) - 1
    status = "200 OK"
    if headers.get("range", "").startswith("bytes="):
        low, _, high = headers["range"].removeprefix("bytes=").partition("-")
        start, end, status = int(low), min(int(high or end), end), "206 Partial Content"
    response = [f"HTTP/1.1 {status}", f"Content-Length: {end + 1 - start}", f'ETag: "{hash(data):x}"']
    response += [f"Content-Range: bytes {start}-{end}/{len(data)}", f"Last-Modified: {formatdate(usegmt=True)}", "", ""]
    return ["\r\n".join(response).encode(), b"" if method == "HEAD" else data[start : end + 1]]


if __name__ == "__main__":
    main()
