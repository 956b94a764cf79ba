"""Cost of a layout in time and memory, by arithmetic alone."""
