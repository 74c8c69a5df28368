"""The program `mergedt`; `ray submit` can send this one file to a cluster that has the package."""

from dt.errors import INTERRUPTED


def main() -> None:
    """Run the command line."""
    try:
        from orchestrator.cli import app  # takes a second: Ctrl-C may come before there is anything to interrupt
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    app()


if __name__ == "__main__":
    main()
