"""Studies from Python, as a notebook or a script uses them."""
