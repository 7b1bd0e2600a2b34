"""Measurements. Each prints one JSON object last; results with machine and date are in benchmarks/README.md."""
