"""Mend damaged pages of a running server: judged again under the lock, evidence first, written, read back.

At every moment a kill leaves each page either as it was, or good, or torn between both, which is a bad
checksum that the next run mends. While a page that can be read is replaced nobody else may touch its table,
and no buffer holds it: so no buffer can ever write the old content over the new.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from knockwood.errors import HostError, RefusedError
from knockwood.host import clock
from knockwood.host.direct import write_block
from knockwood.integrity.check import Subject
from knockwood.model.wal import Lsn
from knockwood.postgres.connection import connect, translated, with_words
from knockwood.postgres.pages import PAGE_BYTES, bad_pages, decode_header, sealed
from knockwood.recover import pages_facts as facts
from knockwood.recover.evidence import Keep
from knockwood.recover.pages_facts import Target
from knockwood.recover.pages_images import Good, require_proven
from knockwood.recover.pages_logged import log_pages
from knockwood.recover.pages_session import Patience, Session, session
from knockwood.recover.plan.page_masks import describe, same
from knockwood.recover.plan.page_wal import READS, WalFacts
from knockwood.recover.plan.pages import (
    InBuffers,
    Judgement,
    OnDisk,
    PageClass,
    Procedure,
    classify,
    segment_of,
    segment_path,
)


class Images(Protocol):
    """Gives good images of blocks, the newest there are, or those from just before a record.

    Of several backups each has its own; what none of them proves is in the doubts of the last. With `unread`,
    nobody can read the pages as they are: what the WAL says of them from long before need not be told.
    """

    def __call__(
        self,
        target: Target,
        blocks: Collection[int],
        before: Lsn | None = None,
        beyond: Mapping[int, Lsn] = ...,
        *,
        unread: bool = False,
    ) -> Sequence[Good]: ...


class OutdatedError(RefusedError):
    """The WAL names a block after the point that the good image is of: a newer clone is needed."""

    retry_safe = True


@dataclass(frozen=True, slots=True)
class Looked:
    """Judgements of some blocks, with what they were made from."""

    target: Target
    judgements: Mapping[int, Judgement]
    pages: Mapping[int, bytes | None]
    wal: Mapping[int, WalFacts]

    def blocks(self, *procedures: Procedure) -> list[int]:
        return sorted(b for b, j in self.judgements.items() if j.procedure in procedures)


@dataclass(slots=True)
class Repaired:
    """What came of it. `locked_seconds` is how long the table was locked; `described` tells the damage.

    `unproven` are blocks that stayed as they were, because no image of them is proven, with the reason;
    `old_images` are mended ones of which the WAL keeps an image of the old page, with the record that has it;
    `logged` are those that the WAL has as they were mended.
    """

    mended: list[int] = field(default_factory=list)
    healthy: list[int] = field(default_factory=list)
    lock: str = "nothing"
    locked_seconds: float = 0.0
    described: dict[int, str] = field(default_factory=dict)
    verified: str = "not checked"
    unproven: dict[int, str] = field(default_factory=dict)
    old_images: dict[int, Lsn] = field(default_factory=dict)
    logged: list[int] = field(default_factory=list)


def look(
    open_session: Session,
    target: Target,
    blocks: Collection[int],
    since: Lsn,
    known: Mapping[int, WalFacts] | None = None,
    *,
    beyond: Mapping[int, Lsn] = facts.NOTHING_KNOWN,
) -> Looked:
    """Judge the blocks as they are now. The WAL since `since` is read where the judgement needs it, unless
    what it says is `known`. `beyond` are starts of records known to have changed blocks.

    The order makes it true: first the WAL, then the buffers, then the disk. A change that the WAL has and no
    buffer holds has been written. What a buffer or the disk shows beyond that WAL is read of it then.
    """
    subject = open_session.subject
    server = open_session.server()
    relation = target.facts()
    wal: Mapping[int, WalFacts] = {
        block: WalFacts(False, reason="not asked for", beyond=beyond.get(block)) for block in blocks
    }
    if known is not None:
        wal = known
    elif server.superuser and not server.in_recovery and _needs_wal(open_session, target, blocks):
        until = facts.flush_wal(subject, target.database)
        wal = facts.wal_facts(subject, target, blocks, since, until, beyond)
    buffers = open_session.buffers(target, blocks)
    pages = {block: facts.read_page(subject, target.path, block) for block in blocks}
    count = facts.length(open_session.connection, target)
    disk = {block: facts.on_disk(pages[block], block, count) for block in blocks}
    wal = _up_to_what_is_seen(subject, target, wal, buffers, disk)
    judgements = {
        block: classify(disk[block], buffers[block], wal[block], relation, server) for block in blocks
    }
    return Looked(target, judgements, pages, wal)


def _up_to_what_is_seen(
    subject: Subject,
    target: Target,
    wal: Mapping[int, WalFacts],
    buffers: Mapping[int, InBuffers],
    disk: Mapping[int, OnDisk],
) -> Mapping[int, WalFacts]:
    """The facts, gone on with where a page is of a later change than the WAL was read to.

    That change may be an image made of a page that had lost changes: by its LSN alone it would pass for new.
    """
    late: dict[int, Lsn] = {}
    for block, known in wal.items():
        shown = [lsn for lsn in (buffers[block].lsn, disk[block].lsn) if lsn is not None]
        if known.known and shown and max(shown) > known.until:
            late[block] = max(shown)
    if not late:
        return wal
    until = facts.flush_wal(subject, target.database)
    later = facts.wal_facts(subject, target, late, min(wal[block].until for block in late), until)
    # What came after the change that was seen the page need not have.
    return {**wal, **{block: wal[block].gone_on(later[block], seen) for block, seen in late.items()}}


def _needs_wal(open_session: Session, target: Target, blocks: Collection[int]) -> bool:
    """Whether the WAL since the backup, which may be long, has to tell anything: not of pages that neither
    the disk nor a buffer can give to anybody."""
    if target.kind not in ("r", "t"):
        return False
    for block in blocks:
        page = facts.read_page(open_session.subject, target.path, block)
        if page is not None and (len(page) < PAGE_BYTES or not bad_pages(page, block, True)):
            return True
    return any(each.state != "absent" for each in open_session.buffers(target, blocks).values())


def repair(
    subject: Subject,
    database: str,
    oid: int,
    blocks: Sequence[int],
    procedure: Procedure,
    since: Lsn,
    *,
    images: Images,
    keep: Keep,
    beyond: Mapping[int, Lsn] = facts.NOTHING_KNOWN,
    patience: Patience | None = None,
) -> Repaired:
    """Mend the blocks of one relation by the procedure that was planned for them, or a milder one.

    `beyond` are starts of records known to have changed blocks, however old. Raises RefusedError, with nothing
    changed, where a block needs another procedure by now or no image is proven; OutdatedError where the images
    are too old.
    """
    with session(subject, database) as first:
        target = facts.target_of(first.connection, database, oid)
        seen = look(first, target, blocks, since, beyond=beyond)
        _require(seen, procedure)
    done = Repaired(healthy=seen.blocks(Procedure.NOTHING))
    damaged = {block: page for block, page in seen.pages.items() if page and block not in done.healthy}
    keep(_named(target, damaged, "damaged"))
    milder = seen.blocks(Procedure.WRITE)
    wait = patience or Patience()
    for chosen, wanted in ((Procedure.WRITE, milder), (procedure, seen.blocks(procedure))):
        left = [block for block in wanted if block not in done.mended and block not in done.unproven]
        for before, together in _by_stop(seen, left).items():
            given: Sequence[Good | None] = [None]
            if chosen is not Procedure.SAVE_BUFFER:
                unread = chosen is Procedure.WRITE
                given = images(target, together, before, beyond, unread=unread)
            for good in given:
                some = together if good is None else sorted(good.images)
                if some:
                    _one_lock(subject, seen, chosen, some, since, good, before, keep, wait, done)
            if given[-1] is not None:
                done.unproven.update(given[-1].doubts)
    if not done.mended and not done.healthy:
        require_proven(target, done.unproven)
    return done


def _named(target: Target, pages: Mapping[int, bytes], what: str) -> dict[str, bytes]:
    return {f"{target.node[2]}-{block}.{what}": page for block, page in pages.items()}


def _by_stop(seen: Looked, blocks: Sequence[int]) -> dict[Lsn | None, list[int]]:
    """The blocks by the record that their good image lies before; None: it is the newest."""
    found: dict[Lsn | None, list[int]] = {}
    for block in blocks:
        poison = seen.wal[block].poison
        found.setdefault(poison.first_after if poison else None, []).append(block)
    return found


def _require(seen: Looked, procedure: Procedure) -> None:
    allowed = {procedure, Procedure.NOTHING}
    if procedure is Procedure.REPLACE:
        allowed.add(Procedure.WRITE)  # torn by a run that was killed
    for block, judgement in sorted(seen.judgements.items()):
        if judgement.procedure not in allowed:
            raise RefusedError(
                f"block {block} is {judgement.damage} now, planned was {procedure}: {judgement.reason}",
                where=seen.target.name,
                hint="make a new plan",
            )


def _one_lock(
    subject: Subject,
    seen: Looked,
    procedure: Procedure,
    blocks: list[int],
    since: Lsn,
    good: Good | None,
    before: Lsn | None,
    keep: Keep,
    patience: Patience,
    done: Repaired,
) -> None:
    target = seen.target
    if good is not None:
        if before is not None:
            # A crash would replay the bad images since the last checkpoint over what is written now.
            with subject.connect() as connection, translated():
                connection.execute("checkpoint")
        untouched = [block for block in blocks if block in good.empty and not any(seen.pages[block] or b"x")]
        done.healthy += untouched
        blocks = [block for block in blocks if block not in untouched]
        if not blocks:
            return
        if set(blocks) & good.empty:
            raise RefusedError(f"block {min(good.empty)} is empty on the clone", where=target.name)
        # Without the lock first: what comes in under it is then short.
        until = facts.flush_wal(subject, target.database)
        later = facts.wal_facts(subject, target, blocks, good.reached, until)
        _require_current(later, target, reads=before is not None)
        keep(_named(target, {block: good.images[block] for block in blocks}, "good"))
    mode = Judgement(PageClass.REFUSED, procedure, "").lock
    with session(subject, target.database) as locked:
        locked.lock(target, mode, patience)
        began = clock.monotonic()
        try:
            known = {block: seen.wal[block].beyond for block in blocks}
            beyond = {block: lsn for block, lsn in known.items() if lsn is not None}
            work = _Work(locked, target, blocks, procedure, good, before, beyond, keep, done)
            work.run(since)
        finally:
            locked.connection.rollback()
            done.lock = mode
            done.locked_seconds += clock.monotonic() - began


def _require_current(later: Mapping[int, WalFacts], target: Target, *, reads: bool) -> None:
    """Raise unless no later record changed a block; with `reads` what readers write is no change."""
    for block, wal in sorted(later.items()):
        if not wal.known:
            raise RefusedError(
                f"the image of block {block} is not proven the newest: {wal.reason}", where=target.name
            )
        changes = [record for record in wal.records if not (reads and record.kind in READS)]
        if changes:
            raise OutdatedError(
                f"block {block} was changed at {changes[-1].lsn}, after the clone's end", where=target.name
            )


@dataclass(slots=True)
class _Work:
    """What happens while the lock is held."""

    session: Session
    target: Target
    blocks: list[int]
    procedure: Procedure
    good: Good | None
    before: Lsn | None
    beyond: Mapping[int, Lsn]
    keep: Keep
    done: Repaired

    def run(self, since: Lsn) -> None:
        seen = self._judge_again(since)
        _require(seen, self.procedure)
        self.done.healthy += [b for b in seen.blocks(Procedure.NOTHING) if b not in self.done.healthy]
        blocks = [b for b in self.blocks if seen.judgements[b].procedure is not Procedure.NOTHING]
        if not blocks:
            return
        images = self._images(blocks, seen)
        damaged = {block: page for block in blocks if (page := seen.pages[block])}
        self.done.described |= {block: describe(page, images[block]) for block, page in damaged.items()}
        # Nearly always what was kept before the lock: then this costs nothing.
        self.keep(_named(self.target, damaged, "damaged"))
        if self.procedure is Procedure.REPLACE:
            self.session.evict(self.target, blocks)
        self._write(blocks, images)
        self._read_back(blocks, images)
        self.done.verified = self._verify(blocks, images)
        self.done.mended += blocks
        self.done.logged += log_pages(self.session, self.target, {block: images[block] for block in blocks})
        if self.before is not None:
            self.done.old_images.update(dict.fromkeys(blocks, self.before))

    def _judge_again(self, since: Lsn) -> Looked:
        subject, target = self.session.subject, self.target
        now = facts.target_of(self.session.connection, target.database, target.oid)
        if now.node != target.node:
            raise RefusedError("the table was rewritten in the meantime", where=target.name)
        if self.good is None:
            return look(self.session, target, self.blocks, since, beyond=self.beyond)
        until = facts.flush_wal(subject, target.database)
        later = facts.wal_facts(subject, target, self.blocks, self.good.reached, until)
        _require_current(later, target, reads=self.before is not None)
        known = {block: self.good.wal[block].gone_on(later[block], until) for block in self.blocks}
        seen = look(self.session, target, self.blocks, since, known)
        if self.good.since > since and seen.blocks(Procedure.WRITE) != sorted(self.blocks):
            # Somebody can read a page by now: whether it is right all the WAL tells.
            return look(self.session, target, self.blocks, since, beyond=self.beyond)
        return seen

    def _images(self, blocks: list[int], seen: Looked) -> dict[int, bytes]:
        if self.good is not None and self.before is not None:
            redo = self._redo()
            found = {}
            for block in blocks:
                last = seen.wal[block].last
                if last is None or last.lsn >= redo:
                    raise OutdatedError(
                        f"block {block} was read again since the last checkpoint", where=self.target.name
                    )
                # As if the hints had been set on the good page: its LSN is again that of its last record.
                found[block] = sealed(_with_lsn(self.good.images[block], last.end), block)
            return found
        if self.good is not None:
            return {block: sealed(self.good.images[block], block) for block in blocks}
        found = {}
        flushed = facts.flush_wal(self.session.subject, self.target.database)
        for block in blocks:
            image = self.session.buffer_image(self.target, block)
            # WAL before data: a page may not be on disk before the WAL that made it.
            if image is None or not any(image) or decode_header(image).lsn > flushed:
                raise RefusedError(f"block {block} has left the buffers", where=self.target.name)
            found[block] = sealed(image, block)
        return found

    def _redo(self) -> Lsn:
        """From here a crash would replay."""
        with translated():
            row = self.session.connection.execute(
                "select redo_lsn::text from pg_catalog.pg_control_checkpoint()"
            ).fetchone()
        assert row is not None
        return Lsn.parse(row[0])

    def _write(self, blocks: list[int], images: Mapping[int, bytes]) -> None:
        folder = self.session.subject.data_directory
        assert folder is not None
        for block in blocks:
            _, offset = segment_of(block)
            write_block(folder / segment_path(self.target.path, block), offset, images[block])

    def _read_back(self, blocks: list[int], images: Mapping[int, bytes]) -> None:
        for block in blocks:
            page = facts.read_page(self.session.subject, self.target.path, block)
            if page != images[block] and not self._moved_on(page, images[block], block):
                raise HostError(
                    f"block {block} was written and reads back as something else",
                    where=self.target.path,
                    hint="the disk is faulty: move the cluster to another one",
                )

    def _moved_on(self, page: bytes | None, written: bytes, block: int) -> bool:
        """Whether the page was changed since it was written, where writers are not kept away: readable again
        it is theirs at once."""
        return (
            self.procedure is Procedure.WRITE
            and page is not None
            and any(page)
            and not bad_pages(sealed(page, block), block, True)
            and decode_header(page).lsn > decode_header(written).lsn
        )

    def _verify(self, blocks: list[int], images: Mapping[int, bytes]) -> str:
        """Read through the server, which must see the same; then let amcheck look."""
        if self.session.server().sees_buffers:
            for block, image in self.session.buffer_images(self.target, blocks).items():
                right = image is not None and (
                    same(image, images[block]) or self._moved_on(image, images[block], block)
                )
                if not right:
                    raise HostError(
                        f"the server does not read block {block} as it was written",
                        where=self.target.name,
                        hint="run the repair again",
                    )
        problems = self.session.verify_heap(self.target, blocks)
        if problems is None:
            return "the server reads the pages as written; amcheck is not installed: not checked by it"
        if problems:
            return f"amcheck: {'; '.join(problems[:3])}"
        return "the server reads the pages as written, and amcheck finds nothing"


def _with_lsn(page: bytes, lsn: Lsn) -> bytes:
    high, low = lsn.value >> 32, lsn.value & 0xFFFF_FFFF
    return high.to_bytes(4, "little") + low.to_bytes(4, "little") + page[8:]


def standbys(subject: Subject) -> tuple[str, ...]:
    """Who replicates from the server: their copies of the pages were not looked at. Receivers of WAL alone
    have no pages."""
    with connect(with_words(subject.dsn, application_name="knockwood repair")) as connection, translated():
        rows = connection.execute(
            "select distinct coalesce(nullif(application_name, ''), 'pid ' || pid) || "
            "coalesce(' at ' || client_addr::text, '') from pg_catalog.pg_stat_replication"
            " where state in ('streaming', 'catchup') and application_name not like 'knockwood%'"
            " and application_name not like 'pg_receivewal%' order by 1"
        ).fetchall()
    return tuple(row[0] for row in rows)


__all__ = ["Looked", "OutdatedError", "Repaired", "look", "repair", "standbys"]
