"""Compiling for chips, estimating on them and measuring them."""
