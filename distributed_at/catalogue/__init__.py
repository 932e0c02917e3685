"""What a recipe can name, a file a kind: facts in dicts that a reader can see, read without torch."""
