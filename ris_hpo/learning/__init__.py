"""The network: features, outputs, losses, and the way from outputs to sources."""
