"""What makes the documentation: the site's pages, the numbers in them, and the pictures. Not a part of the package."""
