"""The tables. A frame is one row, whatever the number of layers and statistics in it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts rows by itself only for a key that is declared INTEGER.
BigId = BigInteger().with_variant(Integer, "sqlite")

# What a frame row holds, from least to most; judgements need NORMS and above.
SCALARS, NORMS, DETAILS = 0, 1, 2
# What is left of the frames of a folded stretch: nothing, all but histograms, everything.
GONE, BARE, WHOLE = 0, 1, 2
# The states of an alert.
PENDING, SENT, FAILED = "pending", "sent", "failed"
# The states of a finding.
OPEN, RESOLVED = "open", "resolved"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Run(Base):
    """One training job."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)  # the agent's own identifier
    project: Mapped[str] = mapped_column(String(200), index=True)
    info: Mapped[bytes] = mapped_column(LargeBinary)  # JSON of wire.RunInfo
    world_size: Mapped[int] = mapped_column(Integer, server_default="1")
    status: Mapped[str] = mapped_column(String(20), default="running")
    reason: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(Float)  # Unix seconds, as all times here
    last_frame_at: Mapped[float | None] = mapped_column(Float)  # by the job's clock
    # When a step that had just been taken came in last, by the collector's clock.
    heard_at: Mapped[float | None] = mapped_column(Float)
    longest_pause_s: Mapped[float] = mapped_column(Float, server_default="0")  # between two frames
    dropped: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    # Records refused because another one of the same key was stored before.
    conflicts: Mapped[int] = mapped_column(BigInteger, server_default="0")
    loss: Mapped[float | None] = mapped_column(Float)
    loss_nonfinite: Mapped[bool] = mapped_column(Boolean, default=False)
    # Grows with every change; a run is due for judgement while `judged` lags behind.
    changed: Mapped[int] = mapped_column(BigInteger, default=0)
    judged: Mapped[int] = mapped_column(BigInteger, default=0, index=True)
    leased_until: Mapped[float] = mapped_column(Float, default=0.0)
    # What people have set, in place of what the job said of itself; None leaves that as it is.
    name: Mapped[str | None] = mapped_column(String(200))
    tags: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    notes: Mapped[str] = mapped_column(Text, server_default="")


class Optimizer(Base):
    """One optimizer of a run: its frames are counted apart."""

    __tablename__ = "optimizers"
    __table_args__ = (UniqueConstraint("run_id", "name"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    # None once the run was deleted: what the optimizer holds is freed by and by.
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id", ondelete="SET NULL"))
    name: Mapped[str] = mapped_column(String(200))
    layers: Mapped[int] = mapped_column(Integer, default=0)
    frames: Mapped[int] = mapped_column(BigInteger, default=0)
    nonfinite_frames: Mapped[int] = mapped_column(BigInteger, default=0)
    first_step: Mapped[int] = mapped_column(BigInteger, default=0)
    last_step: Mapped[int] = mapped_column(BigInteger, default=0)
    total_norm: Mapped[float | None] = mapped_column(Float)
    # The rank whose frames speak for the run: the only one, or MERGED for all together.
    speaker: Mapped[int] = mapped_column(Integer, server_default="0")
    # Frames of single ranks are kept from this step on; before it only the merged ones are.
    kept_from: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Grows whenever answers may change though no batch came: frames of single steps, or their
    # histograms, were freed, or read in a new grouping since they were folded.
    thinned: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ManifestRow(Base):
    """One version of the layers that an optimizer's frames speak of."""

    __tablename__ = "manifests"

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    layers: Mapped[int] = mapped_column(Integer)
    body: Mapped[bytes] = mapped_column(LargeBinary)  # wire.Manifest as it was sent


class FrameRow(Base):
    """One frame of one rank, or of all of them merged."""

    __tablename__ = "frames"
    __table_args__ = (UniqueConstraint("optimizer_id", "rank", "step"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    optimizer_id: Mapped[int] = mapped_column(ForeignKey("optimizers.id", ondelete="CASCADE"))
    rank: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    holds: Mapped[int] = mapped_column(SmallInteger)  # SCALARS, NORMS or DETAILS
    digest: Mapped[bytes] = mapped_column(LargeBinary)  # of the frame as sent; when merged, of body
    body: Mapped[bytes] = mapped_column(LargeBinary)  # packing.Packed


class Stretch(Base):
    """Frames of many steps folded: 16 columns of one tier, each of 16**tier steps."""

    __tablename__ = "stretches"

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    tier: Mapped[int] = mapped_column(SmallInteger, primary_key=True)  # from 1
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)  # its first step
    columns: Mapped[int] = mapped_column(SmallInteger)  # of those, how many have frames
    manifest: Mapped[int] = mapped_column(Integer)  # version that names the layers
    folded_at: Mapped[float] = mapped_column(Float)
    # Of tier 1: one bit a step whose frame is in it, and what is left of those frames.
    present: Mapped[bytes] = mapped_column(LargeBinary)
    frames: Mapped[int] = mapped_column(SmallInteger)  # GONE, BARE or WHOLE
    body: Mapped[bytes] = mapped_column(LargeBinary)  # tiers.pack_columns
    histograms: Mapped[bytes | None] = mapped_column(LargeBinary)  # tiers.pack_counts


class StretchDue(Base):
    """A stretch that does not say what its frames say: it is to be folded, once it is over."""

    __tablename__ = "stretches_due"

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    tier: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    until: Mapped[int] = mapped_column(BigInteger)  # first step after it
    # Grows with every change, so that a worker sees that it folded what is no longer so.
    changes: Mapped[int] = mapped_column(BigInteger)
    leased_until: Mapped[float] = mapped_column(Float)


class PartialStep(Base):
    """A step of a run of several ranks that not all of them have reported."""

    __tablename__ = "partial_steps"
    __table_args__ = (Index(None, "merged", "opened_at"),)

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    arrived: Mapped[bytes] = mapped_column(LargeBinary)  # one bit a rank, the lowest first
    opened_at: Mapped[float] = mapped_column(Float)  # when the first rank's frame came
    merged: Mapped[bool] = mapped_column(Boolean)  # without the missing ranks, after a timeout


class FindingRow(Base):
    """One problem of one optimizer of a run, through its life."""

    __tablename__ = "findings"
    __table_args__ = (UniqueConstraint("run_id", "optimizer", "kind"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    optimizer: Mapped[str] = mapped_column(String(200))
    kind: Mapped[str] = mapped_column(String(50))
    severity: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20))  # open or resolved
    occurrence: Mapped[int] = mapped_column(Integer, default=1)  # how often it has opened
    layers: Mapped[list[str]] = mapped_column(JSON)
    first_step: Mapped[int] = mapped_column(BigInteger)
    last_step: Mapped[int] = mapped_column(BigInteger)
    summary: Mapped[str] = mapped_column(Text)
    evidence: Mapped[dict[str, Any]] = mapped_column(JSON)
    opened_at: Mapped[float] = mapped_column(Float)
    resolved_at: Mapped[float | None] = mapped_column(Float)
    muted_at: Mapped[float | None] = mapped_column(Float)
    acknowledged_at: Mapped[float | None] = mapped_column(Float)


class ReportRow(Base):
    """What one rank found out of its first non-finite value: its origin, and the steps before."""

    __tablename__ = "reports"

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)  # tag of the wire type
    body: Mapped[bytes] = mapped_column(LargeBinary)  # the record as it was sent


class AuditRow(Base):
    """One comparison of a job's gradients with a reference."""

    __tablename__ = "audits"
    __table_args__ = (UniqueConstraint("run_id", "optimizer", "rank", "step", "method"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    optimizer: Mapped[str] = mapped_column(String(200))
    rank: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    method: Mapped[str] = mapped_column(String(20))
    dtype: Mapped[str] = mapped_column(String(50))
    digest: Mapped[bytes] = mapped_column(LargeBinary)  # of the audit as sent
    passed: Mapped[bool] = mapped_column(Boolean)  # every layer did
    received_at: Mapped[float] = mapped_column(Float)


class AuditedLayerRow(Base):
    """One layer of an audit."""

    __tablename__ = "audited_layers"

    audit_id: Mapped[int] = mapped_column(
        ForeignKey("audits.id", ondelete="CASCADE"), primary_key=True
    )
    place: Mapped[int] = mapped_column(Integer, primary_key=True)  # in the audit, from 0
    layer: Mapped[str] = mapped_column(String(500))
    module: Mapped[str] = mapped_column(String(200))
    relative_error: Mapped[float | None] = mapped_column(Float)  # None where not known
    tolerance: Mapped[float] = mapped_column(Float)
    nonfinite: Mapped[int] = mapped_column(BigInteger)
    reference_nonfinite: Mapped[int] = mapped_column(BigInteger)
    passed: Mapped[bool] = mapped_column(Boolean)


class Alert(Base):
    """One message that one channel is to get: the outbox."""

    __tablename__ = "alerts"
    __table_args__ = (UniqueConstraint("finding_id", "occurrence", "change", "channel"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    finding_id: Mapped[int] = mapped_column(ForeignKey("findings.id", ondelete="CASCADE"))
    occurrence: Mapped[int] = mapped_column(Integer)
    change: Mapped[str] = mapped_column(String(20))  # opened or resolved
    channel: Mapped[str] = mapped_column(String(64))  # its key, or a digest of its URL
    state: Mapped[str] = mapped_column(String(20), default="pending", index=True)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_try_at: Mapped[float] = mapped_column(Float, default=0.0)
    last_error: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(Float)
    sent_at: Mapped[float | None] = mapped_column(Float)


class ChannelRow(Base):
    """Where alerts go that somebody made over the API."""

    __tablename__ = "channels"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)  # random: its public name
    name: Mapped[str] = mapped_column(String(200))
    url: Mapped[str] = mapped_column(Text)  # of Apprise, with its secrets
    project: Mapped[str | None] = mapped_column(String(200))  # None for all of them
    paused: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[float] = mapped_column(Float)


class Listening(Base):
    """Since when collectors have listened to jobs without a gap: one row, for all of them."""

    __tablename__ = "listening"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    since: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float)  # when one of them said so last


class Lease(Base):
    """Who may do what only one process at a time may do, and until when."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    until: Mapped[float] = mapped_column(Float)


class Tick(Base):
    """The last tick of a scheduled task: its number, which only grows, and when it was sent."""

    __tablename__ = "ticks"

    task: Mapped[str] = mapped_column(String(100), primary_key=True)
    window: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[float] = mapped_column(Float)


class TaskCount(Base):
    """What workers have done of one task, for /metrics: any worker adds, any collector shows."""

    __tablename__ = "task_counts"

    task: Mapped[str] = mapped_column(String(100), primary_key=True)
    failures: Mapped[int] = mapped_column(BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    # How many took at most so long, by bound in seconds; the last bound is "+Inf".
    buckets: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)


class FindingChange(Base):
    """One change in the life of a finding: opened, resolved, muted and so on."""

    __tablename__ = "finding_changes"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    finding_id: Mapped[int] = mapped_column(
        ForeignKey("findings.id", ondelete="CASCADE"), index=True
    )
    at: Mapped[float] = mapped_column(Float)
    change: Mapped[str] = mapped_column(String(20))
    step: Mapped[int] = mapped_column(BigInteger)  # the newest one that showed the problem
    severity: Mapped[str] = mapped_column(String(20))
    note: Mapped[str] = mapped_column(Text, default="")


class Event(Base):
    """Something that a rank said happened at a step, as a NaN or a skipped step of AMP."""

    __tablename__ = "events"

    optimizer_id: Mapped[int] = mapped_column(
        ForeignKey("optimizers.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)


class TokenRow(Base):
    """A token: what it is good for, and a hash to know it by."""

    __tablename__ = "tokens"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(20), unique=True)  # the part of it that is no secret
    name: Mapped[str] = mapped_column(String(200))
    scopes: Mapped[str] = mapped_column(String(50))  # separated by spaces
    project: Mapped[str | None] = mapped_column(String(200))  # None for all of them
    digest: Mapped[bytes] = mapped_column(LargeBinary)  # SHA-256 of the secret
    created_at: Mapped[float] = mapped_column(Float)
    last_used_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)
