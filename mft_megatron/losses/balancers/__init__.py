"""Convergence balancers: task weights from validation losses (docs/LOSSES.md §4); ``table`` lists them."""
