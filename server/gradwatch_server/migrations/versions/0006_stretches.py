"""Stretches of folded frames, what is to be folded, and optimizers that outlive their run"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STRETCH_STEPS = 256
ORPHANS = "(SELECT id FROM optimizers WHERE run_id IS NULL)"


def _of_optimizer(table: str) -> tuple[sa.Column, sa.ForeignKeyConstraint]:  # pyright: ignore
    return (
        sa.Column("optimizer_id", BIG_ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["optimizer_id"],
            ["optimizers.id"],
            name=op.f(f"fk_{table}_optimizer_id_optimizers"),
            ondelete="CASCADE",
        ),
    )


def upgrade() -> None:
    op.create_table(
        "stretches",
        *_of_optimizer("stretches"),
        sa.Column("tier", sa.SmallInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("columns", sa.SmallInteger(), nullable=False),
        sa.Column("manifest", sa.Integer(), nullable=False),
        sa.Column("folded_at", sa.Float(), nullable=False),
        sa.Column("present", sa.LargeBinary(), nullable=False),
        sa.Column("frames", sa.SmallInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("histograms", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("optimizer_id", "tier", "start", name=op.f("pk_stretches")),
    )
    op.create_table(
        "stretches_due",
        *_of_optimizer("stretches_due"),
        sa.Column("tier", sa.SmallInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("changes", sa.BigInteger(), nullable=False),
        sa.Column("leased_until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("optimizer_id", "tier", "start", name=op.f("pk_stretches_due")),
    )
    if op.get_bind().dialect.name == "postgresql":
        # They are compressed already: to try again would cost more than their storing.
        for column in ("body", "histograms"):
            op.execute(f"ALTER TABLE stretches ALTER COLUMN {column} SET STORAGE EXTERNAL")
    _on_deletion("SET NULL")
    # What is stored is to be folded like what will come.
    op.execute(
        sa.text(
            "INSERT INTO stretches_due (optimizer_id, tier, start, until, changes, leased_until) "
            "SELECT DISTINCT optimizers.id, 1, step - step % :span, step - step % :span + :span, "
            "1, 0.0 FROM frames JOIN optimizers ON optimizers.id = frames.optimizer_id "
            "WHERE frames.rank = optimizers.speaker"
        ).bindparams(span=STRETCH_STEPS)
    )


def downgrade() -> None:
    op.drop_table("stretches_due")
    op.drop_table("stretches")
    # SQLite does not see to it itself while tables change.
    for table in ("frames", "manifests", "partial_steps", "reports", "events"):
        op.execute(f"DELETE FROM {table} WHERE optimizer_id IN {ORPHANS}")
    op.execute("DELETE FROM optimizers WHERE run_id IS NULL")
    _on_deletion("CASCADE")


def _on_deletion(rule: str) -> None:
    """What becomes of a deleted run's optimizers."""
    name = op.f("fk_optimizers_run_id_runs")
    with op.batch_alter_table("optimizers") as table:
        table.drop_constraint(name, type_="foreignkey")
        table.create_foreign_key(name, "runs", ["run_id"], ["id"], ondelete=rule)
        table.alter_column("run_id", existing_type=BIG_ID, nullable=rule == "SET NULL")
