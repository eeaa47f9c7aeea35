"""Which backends exist, which one is chosen, and how it is configured."""
