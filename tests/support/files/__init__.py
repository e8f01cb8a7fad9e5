"""Writers of files of many formats, for tests."""
