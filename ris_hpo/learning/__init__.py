"""The network and what it is judged by: features, outputs, losses, matching, metrics and the way to sources."""
