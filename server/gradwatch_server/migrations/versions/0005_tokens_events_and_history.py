"""Tokens, events, and the history of findings"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("key", sa.String(length=20), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("scopes", sa.String(length=50), nullable=False),
        sa.Column("project", sa.String(length=200), nullable=True),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_used_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("key", name=op.f("uq_tokens_key")),
    )
    op.create_table(
        "events",
        sa.Column("optimizer_id", BIG_ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(
            ["optimizer_id"],
            ["optimizers.id"],
            name=op.f("fk_events_optimizer_id_optimizers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("optimizer_id", "step", "rank", "name", name=op.f("pk_events")),
    )
    op.create_table(
        "finding_changes",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("finding_id", BIG_ID, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("change", sa.String(length=20), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("severity", sa.String(length=20), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["finding_id"],
            ["findings.id"],
            name=op.f("fk_finding_changes_finding_id_findings"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_finding_changes")),
    )
    op.create_index(op.f("ix_finding_changes_finding_id"), "finding_changes", ["finding_id"])
    op.add_column("findings", sa.Column("muted_at", sa.Float(), nullable=True))
    op.add_column("findings", sa.Column("acknowledged_at", sa.Float(), nullable=True))
    op.add_column("runs", sa.Column("name", sa.String(length=200), nullable=True))
    op.add_column("runs", sa.Column("tags", sa.JSON(), nullable=True))
    op.add_column("runs", sa.Column("notes", sa.Text(), server_default="", nullable=False))


def downgrade() -> None:
    for name, columns in (
        ("runs", ("notes", "tags", "name")),
        ("findings", ("acknowledged_at", "muted_at")),
    ):
        with op.batch_alter_table(name) as table:
            for column in columns:
                table.drop_column(column)
    op.drop_table("finding_changes")
    op.drop_table("events")
    op.drop_table("tokens")
