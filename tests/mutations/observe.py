"""Faults planted in observe/."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
