"""Faults planted in models/."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
