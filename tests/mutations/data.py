"""Faults planted in data/."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
