"""Statistics of paired differences: intervals, tests, corrections, power. Arrays only, no files."""
