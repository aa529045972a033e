"""Running one trial, from claim to end."""
