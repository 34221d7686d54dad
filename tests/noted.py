"""What functions of the tests were called with: kept in a module, of which a cache looks at the file alone."""

CALLS: list[object] = []
