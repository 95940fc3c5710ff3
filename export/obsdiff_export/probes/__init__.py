"""What is tried rather than believed. Each module answers questions in a process of its own, through `asking.ask`."""
