"""What a job is going to do and to take, known before it begins."""
