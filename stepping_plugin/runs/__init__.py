"""A recipe from its data to its report."""
