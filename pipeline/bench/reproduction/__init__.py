"""What trained configs reached: the ledger of results, their comparison, and the lines of configs' headers about them."""
