"""What leaves the repository: the book, slides and pages, hand-outs, copies for hosted runtimes."""
