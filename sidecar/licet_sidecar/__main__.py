"""``python -m licet_sidecar``."""

from licet_sidecar.entry import main

if __name__ == "__main__":
    main()
