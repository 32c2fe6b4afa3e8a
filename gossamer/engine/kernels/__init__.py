"""Fused kernels for inference: gather, radial function, product and sum over neighbours in one pass."""
