"""What a run needs to know of the machine that it is on: limits, addresses, space, places for caches."""
