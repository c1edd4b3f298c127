"""Benchmarks: `python -m benches` compares hdrops with its peers, `pytest benches --benchmark-only` times hdrops alone."""
