"""Audits: stored, listed, and judged as soon as they come.

A finding of theirs is open while the newest comparison of a layer is beyond its tolerance, whatever
the order in which audits came: all of them are looked at again with each that comes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import msgspec
import numpy as np
from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from gradwatch.health import reference_mismatch
from gradwatch.health.judge import Settings
from gradwatch.health.window import Compared, Window
from gradwatch.wire.audit import Audit, AuditedLayer, AuditedLayerView, AuditPage, AuditView
from gradwatch.wire.frame import FrameError
from gradwatch_server.database import finite
from gradwatch_server.findings import resolve, tell
from gradwatch_server.models import OPEN, AuditedLayerRow, AuditRow, FindingRow, Run
from gradwatch_server.storable import refusal

KIND = reference_mismatch.KIND
# Comparisons that are looked at again when an audit comes, the newest of those that ever failed.
MAX_COMPARED = 20_000


class AuditError(ValueError):
    """An audit that cannot be stored. The message names the field."""


class Kept(NamedTuple):
    """What became of an audit that was sent."""

    view: AuditView  # as it is stored, from now on or before
    new: bool
    conflict: bool  # another one of its key was stored before
    alerted: bool  # alerts wait in the outbox


class Wanted(NamedTuple):
    """Which audits of a run to list; None for all."""

    optimizer: str | None = None
    layer: str | None = None  # that they compared
    passed: bool | None = None  # they, or of those of one layer that layer
    after: int | None = None  # `next` of the page before


def keep(
    session: Session, run: Run, audit: Audit, settings: Settings, channels: Sequence[str]
) -> Kept:
    """Store an audit, and open or resolve what it shows. Storing it again changes nothing.

    run: locked by the caller. settings: the thresholds of this run. Raises AuditError.
    """
    _check(audit)
    digest = hashlib.sha256(msgspec.json.encode(audit)).digest()
    known = session.scalar(
        select(AuditRow).where(
            AuditRow.run_id == run.id,
            AuditRow.optimizer == audit.optimizer,
            AuditRow.rank == audit.rank,
            AuditRow.step == audit.step,
            AuditRow.method == audit.method,
        )
    )
    if known is not None:
        conflict = known.digest != digest
        run.conflicts += conflict
        return Kept(_views(session, [known])[0], False, conflict, False)
    thresholds = cast(reference_mismatch.Thresholds, settings[KIND])
    layers = [
        _layer_row(place, audit, layer, thresholds) for place, layer in enumerate(audit.layers)
    ]
    row = AuditRow(
        run_id=run.id,
        optimizer=audit.optimizer,
        rank=audit.rank,
        step=audit.step,
        method=audit.method,
        dtype=audit.dtype,
        digest=digest,
        passed=all(layer.passed for layer in layers),
        received_at=time.time(),
    )
    session.add(row)
    session.flush()
    for layer in layers:
        layer.audit_id = row.id
    session.add_all(layers)
    session.flush()
    alerted = _judge(session, run, audit.optimizer, channels)
    return Kept(_views(session, [row])[0], True, False, alerted)


def page(session: Session, run: Run, wanted: Wanted, limit: int) -> AuditPage:
    """One page of a run's audits, the last received first."""
    chosen = select(AuditRow).where(AuditRow.run_id == run.id)
    if wanted.optimizer is not None:
        chosen = chosen.where(AuditRow.optimizer == wanted.optimizer)
    if wanted.layer is not None:
        own = exists().where(
            AuditedLayerRow.audit_id == AuditRow.id, AuditedLayerRow.layer == wanted.layer
        )
        if wanted.passed is not None:
            own = own.where(AuditedLayerRow.passed == wanted.passed)
        chosen = chosen.where(own)
    elif wanted.passed is not None:
        chosen = chosen.where(AuditRow.passed == wanted.passed)
    if wanted.after is not None:
        chosen = chosen.where(AuditRow.id < wanted.after)
    rows = session.scalars(chosen.order_by(AuditRow.id.desc()).limit(limit + 1)).all()
    return AuditPage(
        audits=_views(session, rows[:limit]),
        next=str(rows[limit - 1].id) if len(rows) > limit else None,
    )


def _check(audit: Audit) -> None:
    try:
        audit.check()
    except FrameError as error:
        raise AuditError(str(error)) from None
    if reason := refusal(audit):
        raise AuditError(reason)


def _layer_row(
    place: int, audit: Audit, layer: AuditedLayer, thresholds: reference_mismatch.Thresholds
) -> AuditedLayerRow:
    tolerance = layer.tolerance
    if tolerance is None:
        tolerance = reference_mismatch.tolerance_of(audit.method, audit.dtype, thresholds)
    row = AuditedLayerRow(
        place=place,
        layer=layer.layer,
        module=layer.module,
        relative_error=finite(layer.relative_error),
        tolerance=tolerance,
        nonfinite=layer.nonfinite,
        reference_nonfinite=layer.reference_nonfinite,
    )
    row.passed = reference_mismatch.is_right(_compared(audit, row))
    return row


def _compared(audit: Audit | AuditRow, layer: AuditedLayerRow) -> Compared:
    """As the detector sees it."""
    return Compared(
        layer=layer.layer,
        rank=audit.rank,
        method=audit.method,
        step=audit.step,
        dtype=audit.dtype,
        error=math.nan if layer.relative_error is None else layer.relative_error,
        tolerance=layer.tolerance,
        nonfinite=layer.nonfinite,
        reference_nonfinite=layer.reference_nonfinite,
    )


def _judge(session: Session, run: Run, optimizer: str, channels: Sequence[str]) -> bool:
    """Bring an optimizer's finding in line with its audits. Returns whether alerts were written."""
    row = session.scalar(
        select(FindingRow).where(
            FindingRow.run_id == run.id, FindingRow.optimizer == optimizer, FindingRow.kind == KIND
        )
    )
    window = Window(
        steps=np.empty(0, dtype=np.int64),
        layers=(),
        statistics={},
        scalars={},
        audits=_newest(session, run, optimizer),
    )
    finding = reference_mismatch.detect(window)
    if finding is not None:
        return tell(session, run, optimizer, row, finding, channels, anew=True)
    if row is not None and row.state == OPEN:
        resolve(session, row, channels)
        return True
    return False


def _newest(session: Session, run: Run, optimizer: str) -> list[Compared]:
    """The newest comparisons of the layers that ever failed; of a healthy job there are none."""
    own = (AuditRow.run_id == run.id, AuditRow.optimizer == optimizer)
    failed = (
        select(AuditedLayerRow.layer)
        .join(AuditRow, AuditRow.id == AuditedLayerRow.audit_id)
        .where(*own, AuditRow.passed.is_(False), AuditedLayerRow.passed.is_(False))
    )
    rows = session.execute(
        select(AuditRow, AuditedLayerRow)
        .join(AuditedLayerRow, AuditedLayerRow.audit_id == AuditRow.id)
        .where(*own, AuditedLayerRow.layer.in_(failed))
        .order_by(AuditRow.step.desc(), AuditRow.rank, AuditRow.method, AuditedLayerRow.layer)
        .limit(MAX_COMPARED)
    )
    return [_compared(audit, layer) for audit, layer in rows]


def _views(session: Session, rows: Iterable[AuditRow]) -> list[AuditView]:
    audits = {row.id: row for row in rows}
    layers: dict[int, list[AuditedLayerView]] = defaultdict(list)
    chosen = select(AuditedLayerRow).where(AuditedLayerRow.audit_id.in_(audits))
    for item in session.scalars(chosen.order_by(AuditedLayerRow.place)):
        layers[item.audit_id].append(
            AuditedLayerView(
                layer=item.layer,
                module=item.module,
                relative_error=item.relative_error,
                tolerance=item.tolerance,
                passed=item.passed,
                nonfinite=item.nonfinite,
                reference_nonfinite=item.reference_nonfinite,
            )
        )
    return [
        AuditView(
            id=row.id,
            optimizer=row.optimizer,
            rank=row.rank,
            step=row.step,
            method=row.method,
            dtype=row.dtype,
            passed=row.passed,
            received_at=row.received_at,
            layers=layers[row.id],
        )
        for row in audits.values()
    ]
