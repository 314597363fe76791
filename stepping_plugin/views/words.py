"""What commands say about their arguments, apart from `views.named`: help must not load torch."""

HELP = "folder of `stepping run`, file of a net (.safetensors), zoo:NAME, or timm model, e.g. resnet18"
