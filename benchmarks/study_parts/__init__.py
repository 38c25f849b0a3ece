"""The parts of benchmarks/study.py: what is run, where the rows are kept, and what is drawn of them."""
