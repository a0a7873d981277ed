"""Random nets, data and questions, answered by the library and by plain loops."""
