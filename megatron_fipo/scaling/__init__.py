"""Planner, pipeline simulator and measurements of training layouts."""
