"""The nested form of a captured model: one forward pass gives the class scores of all subnets."""
