"""Sweeps over everything that `ttq perplexity` can be told, and the reports of what they found.

axes      a TOML file -> the cells of its product
rows      the file of finished cells, safe against kill -9 and shared by processes
run       one cell -> one row
tables    rows -> numbers
published the paper's numbers
page      rows -> report.html and report.md, with the pictures of `pictures`
"""
