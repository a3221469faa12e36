"""Model families: one file of two tables each, weights and configuration entries; ``table`` lists all families."""
