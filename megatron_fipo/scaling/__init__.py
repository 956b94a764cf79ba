"""What a layout costs: memory of its ranks."""
