"""The dashboard: what the collector knows of each run, on pages that refresh themselves."""

from gradwatch_dashboard.launch import command

__all__ = ["command"]
