"""What a base would need on how many GPUs, told from its config alone."""
