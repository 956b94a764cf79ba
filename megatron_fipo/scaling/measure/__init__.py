"""Measurement of layouts on real ranks."""
