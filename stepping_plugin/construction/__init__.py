"""Which unit belongs to which subnet: importance, policies, exact landing on the budgets."""
