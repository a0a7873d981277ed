"""One module for each library that is measured, imported only in the environment where that library is."""
