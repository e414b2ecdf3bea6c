"""Sweeps over the options of `ttq perplexity`, and reports of their results.

axes      a TOML file -> the cells of its product
rows      the file of finished cells; survives kill -9 and is shared by processes
run       one cell -> one row
tables    rows -> numbers
published the paper's numbers
page      rows -> report.html and report.md, with the pictures of `pictures`
"""
