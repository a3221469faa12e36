"""Shares of the tasks in the objective over a whole run: their account, warnings about them, and what to expect."""
