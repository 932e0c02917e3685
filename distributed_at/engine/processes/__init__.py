"""The processes of a run: who starts them, how they agree, stop, fail, and are told apart from hung ones."""
