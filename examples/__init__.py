"""One idea a folder, each run by a test at tiny size."""
