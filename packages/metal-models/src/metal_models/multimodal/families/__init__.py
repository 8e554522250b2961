"""One module for each family of towers, with a class ``Family`` in it."""
