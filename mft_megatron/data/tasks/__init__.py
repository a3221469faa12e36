"""The files of a task, and batches of records read from them."""
