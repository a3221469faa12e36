"""Options whose value has a grammar of its own, one file each: parsed here, used in every room."""
