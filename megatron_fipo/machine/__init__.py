"""Facts about the machine that a run is on: GPUs, limits, addresses, free space, directories for caches."""
