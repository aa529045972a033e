"""The search service: studies, stores, exact budgets, workers, and what is shown of them."""
