"""One file per allocation. A file added here is known to the configuration and to the tests."""
