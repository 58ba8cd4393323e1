"""Example sequences, trained weights, golden structures and benchmark results, shipped as package data."""
