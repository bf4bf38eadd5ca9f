"""`python -m kvfold` is `kvfold`. The verbs are imported here, so that Ctrl-C in that time (0.1 s) is quiet too."""

import sys


def main() -> None:
    """The console script: never returns."""
    try:
        from kvfold.cli.main import main as run_verb

        run_verb()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
