"""Pipeline schedules, their timelines and their simulation."""
