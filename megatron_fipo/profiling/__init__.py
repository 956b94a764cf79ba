"""Measurements of a run on itself: pipeline timers and utilization."""
