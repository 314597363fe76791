"""The original brought back: the parameters of a nested net by least squares, without labels and gradients."""
