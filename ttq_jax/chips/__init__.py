"""Compiling programs for chips, estimating their cycles and measuring their times."""
