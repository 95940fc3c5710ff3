"""`python -m obsdiff_runtime`: the `obsdiff-runtime` command."""

from obsdiff_runtime.cli import main

if __name__ == "__main__":
    main()
