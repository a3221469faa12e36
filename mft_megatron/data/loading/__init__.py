"""Packed data sets as training reads them: rows, the plan of each step, micro-batches, validation draws."""
