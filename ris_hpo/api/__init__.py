"""Studies from Python, as a notebook or a script uses them."""

import warnings

with warnings.catch_warnings():
    # tqdm, which optuna imports, misses a widget in a notebook that nothing here uses
    warnings.filterwarnings("ignore", message="IProgress not found")
    import optuna as optuna
