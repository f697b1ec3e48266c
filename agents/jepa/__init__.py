"""World models that predict their own latents (joint-embedding predictive architectures), their losses and diagnostics."""
