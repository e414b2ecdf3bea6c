"""Decoder models: one decoder, families as presets and checkpoint key maps."""
