"""What nets and engines as files have in common: bounds of their headers, a small experiment, the model's origin."""
