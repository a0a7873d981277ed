"""Other libraries with these matrices inside. Each module needs the library that it is named after."""
