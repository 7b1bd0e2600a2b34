"""Find what was damaged or deleted in a table since it was written, and take it back to where a run makes it again."""

from __future__ import annotations

from hashlib import sha256

from captioner.errors import DamagedFileError
from captioner.store.table import CaptionsTable, Plan, captions_name, plan_part_name, published_name


def reopen_damaged_parts(table: CaptionsTable) -> list[str]:
    """Make the generations of damaged published parts unfinished again; return a sentence for each file.

    Each published part is read once. A damaged one is deleted: a run then captions its rows and publishes it, as after
    a kill in the middle of publishing. The order of the steps does not matter to a start that finds some of them done.
    """
    problems = []
    plans = table.plans()
    for plan in plans:
        if table.is_published(plan.generation) and (problem := _damage_of_record(table, plan)):
            table.directory.delete(published_name(plan.generation))
            problems.append(f"{problem}; it is made again from captions/")
    digests = recorded_digests(table)
    present = table.published_parts()
    for plan in plans:
        for part in sorted(plan.parts) if plan.adds_parts else ():
            if part not in present and not table.is_published(plan.generation):
                continue
            problem = damage_of_part(table, plan, part, digests.get(part))
            if problem:
                _reopen(table, plans, plan, part)
                problems.append(f"{problem}; its {plan.parts[part]:,} images are captioned again")
    return problems


def recorded_digests(table: CaptionsTable) -> dict[int, dict[str, str | int]]:
    """Return for each published part the "sha256" and "num_bytes" that were recorded when it was last written.

    Parts that an unfinished generation may be replacing are left out. Raises DamagedFileError.
    """
    digests: dict[int, dict[str, str | int]] = {}
    for plan in table.plans():
        if table.is_published(plan.generation):
            digests |= table.published_files(plan.generation)
        elif not plan.adds_parts:  # its publish may have been killed while it replaced these
            digests = {part: digest for part, digest in digests.items() if part not in plan.parts}
    return digests


def damage_of_part(table: CaptionsTable, plan: Plan, part: int, recorded: dict[str, str | int] | None) -> str:
    """Return in words how a published part is damaged, or "".

    A part that another program wrote anew, with rows of the planned images, is not damaged: `captioner verify` names
    it, and nobody's work is deleted.
    """
    name = captions_name(part)
    try:
        data = table.directory.read_checked(name)
        if recorded and sha256(data).hexdigest() == recorded["sha256"]:
            return ""
        if recorded and len(data) == recorded["num_bytes"]:
            return f"{table.directory.shown(name)} is damaged: its bytes are not those that were published"
        ids = table.directory.read_table(name, ["image_id"])["image_id"]
    except DamagedFileError as error:
        return str(error).rpartition("; ")[0]
    planned = table.directory.read_table(plan_part_name(plan.generation, part), ["image_id"])["image_id"]
    if not ids.equals(planned):
        return f"{table.directory.shown(name)} is damaged: its rows are not the planned images"
    return ""


def _damage_of_record(table: CaptionsTable, plan: Plan) -> str:
    try:
        table.published_files(plan.generation)
    except DamagedFileError as error:
        return str(error).rpartition("; ")[0]
    return ""


def _reopen(table: CaptionsTable, plans: list[Plan], plan: Plan, part: int) -> None:
    """Delete a part and the records that it was published."""
    for later in plans:
        if not later.adds_parts and part in later.parts and table.is_published(later.generation):
            files = table.published_files(later.generation)
            if files.pop(part, None):
                table.write_published(later.generation, files)
    table.directory.delete(published_name(plan.generation))
    table.directory.delete(captions_name(part))
