"""Facts about the machine that a run is on: limits, addresses, space, cache directories."""
