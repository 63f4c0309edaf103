"""Training of a LoRA adapter, as mlx_lm.lora does it but with less work."""
