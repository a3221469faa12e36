"""Writing a checkpoint's parts: files in threads, in this process or in one behind it, and the end of a save."""
