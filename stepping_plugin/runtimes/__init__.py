"""Stepping where there is no torch: what runs an ONNX export, in Python and in JavaScript."""
