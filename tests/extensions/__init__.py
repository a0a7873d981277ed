"""What a user adds to the library, a file each, as docs/extending shows it."""
