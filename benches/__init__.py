"""Benchmarks: `python -m benches` against the peers, `pytest benches --benchmark-only` for hdrops alone."""
