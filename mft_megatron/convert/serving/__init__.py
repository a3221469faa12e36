"""Checks of a folder before it is served, and its quantised export."""
