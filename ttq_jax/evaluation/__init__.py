"""Judging a recipe: corpora, perplexity, continuations, the tasks of lm-evaluation-harness."""
