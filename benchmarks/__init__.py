"""Benchmarks: one module per user story; contestants' answers are compared before they are timed."""
