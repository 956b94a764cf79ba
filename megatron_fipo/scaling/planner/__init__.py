"""Legal layouts of a model, ranked by the time of an update."""
