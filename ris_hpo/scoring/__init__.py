"""Estimates against truth: assignment, k_loc and its components, the Cramer-Rao floor."""
