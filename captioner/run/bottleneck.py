"""How busy decoding, the device and writing were in a run, and which flag makes it faster."""

from __future__ import annotations

import math
from collections.abc import Mapping

from captioner.console.text import counted

ADVICE = {
    "read": "raise --read-concurrency, or store the images closer to the workers",
    "decode": "raise --decode-cpus",
    "device": "raise --num-workers where there are more GPUs or CPUs, or lower --num-beams",
    "write": "put OUT on faster storage",
    "servers": "raise --concurrency, or give another --endpoint",
}


def busy_shares(seconds: Mapping[str, float], slots: Mapping[str, float], wall: float) -> dict[str, float]:
    """Return the share of the time, 0..1, in which the slots of each kind were busy.

    `seconds`: total of all workers for read, decode, generate and commit. `slots`: how many of "decode", "device" and
    "write" worked in parallel. `wall`: seconds from the end of start-up to the last commit.
    """
    spent = {
        "decode": seconds["read"] + seconds["decode"],  # sequential on a cluster; in one process they overlap
        "device": seconds["generate"],
        "write": seconds["commit"],
    }
    return {name: min(1.0, spent[name] / (wall * slots[name])) for name in spent} if wall > 0 else {}


def bottleneck_line(
    shares: Mapping[str, float],
    seconds: Mapping[str, float],
    slots: Mapping[str, float] | None = None,
    waits_for_servers: bool = False,
) -> str | None:
    """Return one line for a person; None where nothing was measured. `slots`: as for `busy_shares`.

    A run that spent most of its time on starting gets no advice about its stages: `seconds` of "run" and "startup".
    """
    if waits_for_servers:
        shares = {"servers" if name == "device" else name: share for name, share in shares.items()}
    if not shares:
        return None
    slowest = max(shares, key=lambda name: shares[name])
    flag = "read" if slowest == "decode" and seconds["read"] > seconds["decode"] else slowest
    busy = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    run, startup = seconds.get("run", 0.0), seconds.get("startup", 0.0)
    if startup > run / 2:
        return (
            f"busy: {busy}; most of the {run:.0f} s was start-up ({startup:.0f} s), the same for any number of images"
        )
    advice = ADVICE[flag]
    if flag == "decode" and slots and (needed := decode_cpus_needed(seconds, slots)):
        advice += f" (with {counted(needed, 'CPU')} instead of {slots['decode']:g} decoding is not the bottleneck)"
    return f"busy: {busy}; bottleneck: {slowest}; to go faster: {advice}"


def decode_cpus_needed(seconds: Mapping[str, float], slots: Mapping[str, float]) -> int | None:
    """How many CPUs decode images as fast as the devices caption them; None where no device was at work."""
    per_device = seconds["generate"] / slots["device"]
    return math.ceil((seconds["read"] + seconds["decode"]) / per_device) if per_device > 0 else None
