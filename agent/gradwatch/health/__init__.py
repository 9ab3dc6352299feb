"""Detectors: pure functions from a window of frames to findings. No I/O, no torch, no clock."""
