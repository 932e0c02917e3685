"""The attack-conformance suite: checks that any attack must pass, and planted mutations that the checks must catch."""
