"""The dashboard: optuna-dashboard behind a token and a production server."""
