"""Comparisons of training methods: arms with several seeds, trained, paired by seed, and tested."""
