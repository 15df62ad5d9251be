"""What is trained and toward what: student, teacher, and the losses between them."""
