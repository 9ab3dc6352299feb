"""Reports of where non-finite values began"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reports",
        sa.Column(
            "optimizer_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False
        ),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["optimizer_id"],
            ["optimizers.id"],
            name=op.f("fk_reports_optimizer_id_optimizers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("optimizer_id", "rank", "kind", name=op.f("pk_reports")),
    )


def downgrade() -> None:
    op.drop_table("reports")
