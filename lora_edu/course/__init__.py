"""The machinery of teaching: graders of the exercises, executing and checking notebooks, the book, the command line."""
