"""The workshop of bitfuse: the command line and what it runs. Importing it imports no torch."""
