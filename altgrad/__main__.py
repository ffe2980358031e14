"""``python -m altgrad`` and the command ``altgrad``."""

import sys


def main() -> None:
    """Runs the command line, which needs the extra ``report``."""
    try:
        from .report.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"altgrad: {(error.name or '').partition('.')[0]} is missing: pip install 'altgrad[report]'")
    sys.exit(run())


if __name__ == "__main__":
    main()
