"""Watchdog of hangs: a thread on every rank that names the ranks that did not arrive, and ends a run that hangs."""
