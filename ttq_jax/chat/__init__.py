"""Messages through a model's chat template: what `generate`, `stream` and `ttq chat` ask."""
