"""Writing in one step: files, folders, stores of results, and what is written beside them."""
