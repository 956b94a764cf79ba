"""Functions that read what others wrote, with inputs that hypothesis makes up. What was found is kept as tests beside
those of each function."""
