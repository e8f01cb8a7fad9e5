"""Generation: the continuation of a prompt, token by token; the score of a text."""
