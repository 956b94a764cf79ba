"""What a run's directory tells, drawn: training-dynamics figures and one page that holds them."""
