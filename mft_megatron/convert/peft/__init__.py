"""Import, export, listing and merging of adapters in PEFT's format."""
