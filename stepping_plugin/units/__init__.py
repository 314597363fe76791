"""Which channels move together, their levels, and what subnets cost."""
