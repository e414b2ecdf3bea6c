"""What is made once per model, ahead of any prompt: moments, priors, static factors, widths."""
