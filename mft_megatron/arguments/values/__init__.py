"""Options whose value has a grammar of its own, one file each: parsed once, used by every room."""
