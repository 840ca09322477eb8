"""What the two clouds look like, before and after."""
