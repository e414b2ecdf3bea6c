"""What is made once per model, before any prompt: moments, priors, static factors, widths."""
