"""Boosted trees that read digits: a training program of one's own with scikit-learn. Its study is digits.toml."""

import pickle

from sklearn.datasets import load_digits
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split


def train(trial):
    images, digits = load_digits(return_X_y=True)
    seen, held_back, known, wanted = train_test_split(images, digits, train_size=300, random_state=0)
    if saved := trial.saved("trees.pickle"):
        trees = pickle.loads(saved.read_bytes())  # written by this very trial
    else:
        trees = GradientBoostingClassifier(
            n_estimators=0, warm_start=True, random_state=trial.seed, max_features="sqrt", **trial.config["trees"]
        )
    while trees.n_estimators < trial.config["rounds"]:
        if trial.should_stop():
            trial.requeue()
        trees.n_estimators += 2
        trees.fit(seen, known)
        loss = log_loss(wanted, trees.predict_proba(held_back))
        if trial.report(trees.n_estimators, loss, accuracy=trees.score(held_back, wanted)):
            return
        with trial.saving("trees.pickle") as path:
            path.write_bytes(pickle.dumps(trees))
