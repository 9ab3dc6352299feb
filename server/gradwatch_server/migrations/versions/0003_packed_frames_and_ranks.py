"""Frames packed, with a digest of what was sent; ranks merged"""

import hashlib
import json

import sqlalchemy as sa
from alembic import op

from gradwatch.wire.codec import decode_frame, encode_record
from gradwatch_server.packing import pack_frame, unpack_frame

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CHUNK = 500
MERGED = -1


def upgrade() -> None:
    with op.batch_alter_table("runs") as table:
        table.add_column(sa.Column("world_size", sa.Integer(), nullable=False, server_default="1"))
        table.add_column(
            sa.Column("conflicts", sa.BigInteger(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("optimizers") as table:
        table.add_column(sa.Column("speaker", sa.Integer(), nullable=False, server_default="0"))
        table.add_column(
            sa.Column("kept_from", sa.BigInteger(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("frames") as table:
        table.add_column(sa.Column("digest", sa.LargeBinary(), nullable=True))
    op.create_table(
        "partial_steps",
        sa.Column("optimizer_id", BIG_ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("arrived", sa.LargeBinary(), nullable=False),
        sa.Column("opened_at", sa.Float(), nullable=False),
        sa.Column("merged", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["optimizer_id"],
            ["optimizers.id"],
            name=op.f("fk_partial_steps_optimizer_id_optimizers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("optimizer_id", "step", name=op.f("pk_partial_steps")),
    )
    op.create_index(op.f("ix_partial_steps_merged"), "partial_steps", ["merged", "opened_at"])
    _count_worlds()
    _rewrite(_pack)
    with op.batch_alter_table("frames") as table:
        table.alter_column("digest", existing_type=sa.LargeBinary(), nullable=False)
    if op.get_bind().dialect.name == "postgresql":
        # They are compressed already: to try again would cost more than their storing.
        op.execute("ALTER TABLE frames ALTER COLUMN body SET STORAGE EXTERNAL")


def downgrade() -> None:
    op.execute(sa.text("DELETE FROM frames WHERE rank = :merged").bindparams(merged=MERGED))
    op.execute(sa.text("DELETE FROM manifests WHERE rank = :merged").bindparams(merged=MERGED))
    _rewrite(_unpack)
    op.drop_table("partial_steps")
    for name, columns in (
        ("frames", ("digest",)),
        ("optimizers", ("kept_from", "speaker")),
        ("runs", ("conflicts", "world_size")),
    ):
        with op.batch_alter_table(name) as table:
            for column in columns:
                table.drop_column(column)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE frames ALTER COLUMN body SET STORAGE EXTENDED")


def _count_worlds() -> None:
    """Runs of several ranks: their first rank's frames speak for the run, as they did."""
    bind = op.get_bind()
    for run_id, info in bind.execute(sa.text("SELECT id, info FROM runs")).all():
        size = json.loads(info).get("world_size", 1)
        if size == 1:
            continue
        told = {"size": size, "run": run_id, "merged": MERGED}
        bind.execute(sa.text("UPDATE runs SET world_size = :size WHERE id = :run"), told)
        bind.execute(sa.text("UPDATE optimizers SET speaker = :merged WHERE run_id = :run"), told)
        of_run = "optimizer_id IN (SELECT id FROM optimizers WHERE run_id = :run)"
        bind.execute(
            sa.text(
                "INSERT INTO frames (optimizer_id, rank, step, holds, body) "
                "SELECT optimizer_id, :merged, step, holds, body FROM frames "
                f"WHERE rank = 0 AND {of_run}"
            ),
            told,
        )
        bind.execute(
            sa.text(
                "INSERT INTO manifests (optimizer_id, rank, version, layers, body) "
                "SELECT optimizer_id, :merged, version, layers, body FROM manifests "
                f"WHERE rank = 0 AND {of_run}"
            ),
            told,
        )


def _pack(body: bytes, _optimizer: str, _rank: int, _step: int) -> dict[str, bytes]:
    return {"digest": hashlib.sha256(body).digest()[:16], "body": pack_frame(decode_frame(body))}


def _unpack(body: bytes, optimizer: str, rank: int, step: int) -> dict[str, bytes]:
    return {"digest": b"", "body": encode_record(unpack_frame(body, optimizer, rank, step))}


def _rewrite(change) -> None:  # pyright: ignore
    """Every frame's row anew, some at a time."""
    bind = op.get_bind()
    last = 0
    while True:
        rows = bind.execute(
            sa.text(
                "SELECT frames.id, optimizers.name, rank, step, body FROM frames "
                "JOIN optimizers ON optimizers.id = frames.optimizer_id "
                "WHERE frames.id > :last ORDER BY frames.id LIMIT :some"
            ),
            {"last": last, "some": CHUNK},
        ).all()
        if not rows:
            return
        bind.execute(
            sa.text("UPDATE frames SET digest = :digest, body = :body WHERE id = :id"),
            [{"id": row[0], **change(bytes(row[4]), row[1], row[2], row[3])} for row in rows],
        )
        last = rows[-1][0]
