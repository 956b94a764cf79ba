"""Facts about the machine that a run is on: limits, addresses, space, places for caches."""
