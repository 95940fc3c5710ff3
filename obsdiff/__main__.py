"""`python -m obsdiff`, which torchrun starts: `torchrun --nproc-per-node 2 -m obsdiff prune ...`."""

from obsdiff.cli import main

if __name__ == "__main__":
    main()
