"""What implementations of several operators share."""
