"""Quantizers: pure functions of a weight and its activation moments.

A recipe is a point in a space of four independent choices, a file each: whose moments (`moments`),
which scale (`scaling`), which rounding (`grid`, `clip`), which low rank (`lowrank`). `convert`
composes them; `recipe` names the compositions.
"""
