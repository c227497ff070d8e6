"""Our own layout on disk: whole-or-nothing writes, lazy reads, placement on a mesh."""
