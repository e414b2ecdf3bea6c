"""Quantizers: pure functions of a weight and its activation moments.

A recipe is a point in a space of four independent choices: whose moments (`source`, `moments`),
which scale (`scaling`), which rounding (`grid`, `clip`, `second_order`, `half_quadratic`), which
low rank (`lowrank`). `convert` composes them; `recipe` names the compositions.
"""
