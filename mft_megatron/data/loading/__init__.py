"""What training reads: rows of a packed data set, the plan of a step, the proof of use."""
