"""Calibration of the planner's constants on this machine."""
