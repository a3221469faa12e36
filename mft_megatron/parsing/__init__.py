"""Files from anywhere: JSON, pickles and pointers, parsed without trust in them."""
