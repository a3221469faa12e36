"""The files of a task to batches of records or of tokenised documents."""
