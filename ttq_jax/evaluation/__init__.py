"""Evaluating a recipe: corpora, perplexity, continuations, lm-evaluation-harness."""
