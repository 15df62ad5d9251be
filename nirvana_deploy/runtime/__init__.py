"""What generates tokens: runtimes by name, behind one interface."""
