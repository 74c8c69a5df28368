"""The program `mergedt`; `ray submit` can send this one file to a cluster that has the package."""

import signal


def main() -> None:
    """Run the command line."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if by_default:  # what takes a second to import ends at Ctrl-C without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from orchestrator.cli import app

    if by_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
