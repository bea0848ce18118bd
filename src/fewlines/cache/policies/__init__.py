"""One file per policy. A file added here is known to the configuration and to the tests."""
