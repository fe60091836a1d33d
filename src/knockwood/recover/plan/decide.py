"""From findings to the smallest safe plan that heals them: a pure function of what was found and is known.

Each rule, and each repairer that looked at the damage, makes offers. Of every finding's offers the best one is
taken (without loss before with loss, then the smaller kind of repair), and what is then superfluous is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from knockwood.model.finding import Finding
from knockwood.model.recovery import Alternative, ExpectedLoss, Plan, Step
from knockwood.recover.plan.damage import OF_TABLES, Damage, Kind, classify
from knockwood.recover.plan.offer import Offer, key
from knockwood.recover.plan.rules import constraints, indexes, sequences, tables, whole
from knockwood.recover.plan.situation import Situation

_RULES = (indexes.offers, sequences.offers, constraints.offers)

_FACTS: dict[str, tuple[Callable[[Situation], bool | None], str]] = {
    "the server is up": (lambda s: s.server_up, "the server does not answer"),
    "the server is the primary": (
        lambda s: None if s.in_recovery is None else not s.in_recovery,
        "the server is a standby: mend the primary, or build the standby anew from the repository",
    ),
    "a superuser": (
        lambda s: s.superuser,
        "the role that Knockwood connects as is no superuser: say one with --role",
    ),
    "local reach": (
        lambda s: None if s.reach is None else s.reach == "local",
        "the server's files are not within reach",
    ),
    "the target can be reached": (
        lambda s: None if s.whole is None else s.whole.refused is None,
        "the archive does not reach the target",
    ),
    "room for a second cluster": (lambda s: _room(s), "the disk has no room for a second cluster"),
}
"""Preconditions that are facts already when the plan is made; others are looked at when their step runs."""


def decide(findings: Iterable[Finding], situation: Situation, offers: Sequence[Offer] = ()) -> Plan:
    """The plan. `offers` are those of the repairers that looked at the damage (pages, rows, tables).

    Every finding is either among what the plan heals or named, with the reason, in what it refuses.
    """
    known = {key(finding): finding for finding in findings}
    damages = [classify(known[name], situation) for name in sorted(known)]
    everything = [offer for rule in _RULES for offer in rule(damages, situation)]
    everything += [replace(offer, heals=offer.heals & known.keys()) for offer in offers]
    everything.sort(key=lambda offer: offer.order)
    ordered = whole.in_place(damages, situation)
    candidates = [_with_facts(offer, situation) for offer in ([ordered] if ordered else everything)]
    candidates = sorted((offer for offer in candidates if ordered or offer.heals), key=lambda o: o.order)
    chosen = _choose(damages, candidates, ordered is not None)
    healed = frozenset().union(*(offer.heals for offer in chosen))
    return Plan(
        cluster=situation.cluster,
        purpose=_purpose(damages, healed, ordered),
        steps=_steps(chosen),
        expected_loss=_loss(chosen),
        heals=tuple(damage.finding for damage in damages if key(damage.finding) in healed),
        alternatives=_alternatives(everything if ordered else candidates, chosen, situation, damages),
        refused=(
            *(f"{offer.title}: {offer.refused}" for offer in candidates if ordered and offer.refused),
            *_refusals(damages, healed, candidates, situation),
        ),
    )


def _with_facts(offer: Offer, situation: Situation) -> Offer:
    """The offer, refused when something that its steps rest on is not so, or not known to be so."""
    if offer.refused is not None:
        return offer
    if not offer.steps:
        return replace(offer, refused="there is nothing in it to do")
    for step in offer.steps:
        for precondition in step.preconditions:
            fact, reason = _FACTS.get(precondition.name, (lambda _: True, ""))
            holds = fact(situation)
            if not holds:
                unknown = f"it is not known whether {precondition.name}"
                return replace(offer, refused=unknown if holds is None else reason)
    return offer


def _room(situation: Situation) -> bool | None:
    given = situation.whole
    if given is None or given.backup_bytes is None or given.free_bytes is None:
        return None
    return given.free_bytes > given.backup_bytes + (given.wal_bytes or 0)


def _choose(damages: Sequence[Damage], candidates: Sequence[Offer], ordered: bool) -> list[Offer]:
    """The offers that are carried out; `candidates` are in the order of preference."""
    possible = [offer for offer in candidates if offer.refused is None]
    if ordered:
        return possible
    gone = _gone(candidates)
    while True:
        chosen = _cover(possible)
        healed = frozenset().union(*(offer.heals for offer in chosen))
        unsound = {
            damage.table
            for damage in damages
            if damage.kind in OF_TABLES and key(damage.finding) not in healed | gone
        }
        kept = [offer for offer in possible if offer.sound_table not in unsound or offer not in chosen]
        if len(kept) == len(possible):
            return chosen
        possible = kept


def _gone(candidates: Iterable[Offer]) -> frozenset[str]:
    """Findings whose damage is not there any more: somebody mended it since."""
    return frozenset().union(*(offer.heals for offer in candidates if offer.gone))


def _cover(possible: Sequence[Offer]) -> list[Offer]:
    """The first offer for each finding, without those whose findings the others heal anyway."""
    best: dict[str, Offer] = {}
    for offer in possible:
        for name in offer.heals:
            best.setdefault(name, offer)
    chosen = [offer for offer in possible if offer in best.values()]
    # The larger one is needed for something else: what it heals on the way needs no repair of its own.
    for offer in list(chosen):
        others = frozenset().union(*(each.heals for each in chosen if each is not offer))
        if offer.heals <= others:
            chosen.remove(offer)
    return chosen


def _steps(chosen: Iterable[Offer]) -> tuple[Step, ...]:
    ordered = sorted(chosen, key=lambda offer: (offer.turn, *offer.order))
    return tuple(step for offer in ordered for step in offer.steps)


def _loss(chosen: Iterable[Offer]) -> ExpectedLoss:
    """All losses together; one that is unknown makes the sum unknown."""
    losses = [offer.expected_loss for offer in chosen]
    transactions = [loss.transactions for loss in losses]
    rows = [loss.rows for loss in losses]
    return ExpectedLoss(
        None if None in transactions else sum(count or 0 for count in transactions),
        None if None in rows else sum(count or 0 for count in rows),
        "; ".join(dict.fromkeys(loss.detail for loss in losses if loss.detail)),
    )


def _alternatives(
    candidates: Iterable[Offer], chosen: Sequence[Offer], situation: Situation, damages: Sequence[Damage]
) -> tuple[Alternative, ...]:
    found = [
        Alternative(
            offer.title,
            offer.refused or _why_not(offer, chosen),
            offer.expected_loss,
            offer.locks,
            offer.seconds,
        )
        for offer in candidates
        if offer not in chosen
    ]
    if damages:
        found += [*tables.alternatives(damages), *whole.alternatives(situation, bool(chosen))]
    return tuple(found)


def _why_not(offer: Offer, chosen: Sequence[Offer]) -> str:
    rivals = [each for each in chosen if each.heals & offer.heals]
    if any(each.rank > offer.rank for each in rivals):
        larger = next(each for each in rivals if each.rank > offer.rank)
        if larger.expected_loss.nothing or not offer.expected_loss.nothing:
            return f"{larger.title} is done anyway, and heals this too"
    if not offer.expected_loss.nothing and any(each.expected_loss.nothing for each in rivals):
        return "it would lose data, and another repair does not"
    return "a smaller repair heals the same" if rivals else "its table holds damage that is not mended"


def _refusals(
    damages: Sequence[Damage], healed: frozenset[str], candidates: Sequence[Offer], situation: Situation
) -> Iterable[str]:
    gone = _gone(candidates)
    for damage in damages:
        name = key(damage.finding)
        if name in healed:
            continue
        reasons = [offer.refused for offer in candidates if name in offer.heals and offer.refused]
        if not reasons and any(name in offer.heals for offer in candidates):
            reasons = ["its table holds damage that is not mended: rebuilt on it, nothing could be trusted"]
        place = f" ({damage.finding.location})" if str(damage.finding.location) else ""
        lasting = name not in gone and situation.server_up and situation.superuser
        if not reasons or (damage.kind in OF_TABLES and lasting):
            reasons.append(_nothing_mends(damage, situation))
        why = "; ".join(dict.fromkeys(reasons))
        yield f"{damage.finding.check}: {damage.finding.summary}{place}: {why}"


def _nothing_mends(damage: Damage, situation: Situation) -> str:
    """Why there is no repair for this damage, and what to do."""
    last = "; the last resort is the whole cluster: knockwood recover --in-place --to latest"
    if damage.kind is Kind.ELSEWHERE:
        return damage.advice
    if damage.kind is Kind.ROWS:
        if not situation.xids:
            return (
                "who wrote it is not known: find the transaction (knockwood blame, knockwood bisect), then"
                " knockwood recover --xid XID"
            )
        return "undoing the transactions named does not heal it"
    if damage.kind is Kind.STATUS:
        return "the status of transactions has no smaller repair that is safe" + last
    if damage.system:
        return "a system catalog is not mended page by page" + last
    table = tables.command(damage)
    beside = f": bring the table back with {table} --in-place, or beside it without" if table else ""
    return "no smaller repair is safe or possible here" + beside + last


def _purpose(damages: Sequence[Damage], healed: frozenset[str], ordered: Offer | None) -> str:
    if ordered is not None:
        return ordered.title
    return f"heal {len(healed)} of {len(damages)} findings" if damages else "nothing was found"
