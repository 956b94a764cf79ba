"""Reports of a run's directory: training-dynamics figures and a self-contained page."""
