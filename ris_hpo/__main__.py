"""``python -m ris_hpo`` is ``ris-hpo``."""

from ris_hpo.cli import main

if __name__ == "__main__":
    main()
