"""Bytes on disk: indexed files, the ledger, atomic writing, stored samples."""
