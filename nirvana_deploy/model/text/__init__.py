"""The text side of a model: chat templates, and the ids that end an answer."""
