"""The program `mergedt`; `ray submit` can send this one file to a cluster that has the package."""

import signal


def main() -> None:
    """Run the command line."""
    former = signal.getsignal(signal.SIGINT)
    if former is signal.default_int_handler:  # what takes a second to import ends at Ctrl-C without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from orchestrator.cli import app

    signal.signal(signal.SIGINT, former)
    app()


if __name__ == "__main__":
    main()
