"""What a person reads about a net or a model."""
