"""What a layout costs and how fast it is: planned on paper, its pipeline simulated, a real one recorded."""
