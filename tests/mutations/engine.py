"""Faults planted in engine/."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
