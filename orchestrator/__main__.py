"""`python -m orchestrator` is `mergedt`; `ray submit` can send this one file to a cluster that has the package."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
