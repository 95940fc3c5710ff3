"""The verbs, by what they work on. Each is also a line in `obsdiff.cli.VERBS`."""
