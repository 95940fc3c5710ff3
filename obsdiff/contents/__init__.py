"""What is inside the things that obsdiff writes and reads: a module for each kind, with a record and a `read`."""
