"""Faults planted in evaluation/."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
