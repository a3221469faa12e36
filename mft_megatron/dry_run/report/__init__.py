"""The report of a dry run as text: heading, table, verdict, advice and details."""
