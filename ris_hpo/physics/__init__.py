"""The scene model: array response, simulation, scene files and Cramer-Rao bounds."""
