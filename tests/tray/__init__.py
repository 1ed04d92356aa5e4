"""What the tests of the tray companion share."""
