"""All planted faults, a file a room."""

from __future__ import annotations

from tests.mutations import (
    cores,
    data,
    engine,
    engine_files,
    engine_rates,
    engine_selection,
    engine_state,
    evaluation,
    evaluation_attacks,
    meaning,
    models,
    networks,
    objectives,
    observe,
    whole_runs,
    words,
    world,
)
from tests.mutations.mutation import Mutation

# How many faults each room must have at least; a room is a folder of the package.
LEAST = {"engine": 140, "evaluation": 60, "models": 20, "data": 30, "observe": 30}
MUTATIONS: tuple[Mutation, ...] = (
    *engine.MUTATIONS,
    *engine_rates.MUTATIONS,
    *engine_state.MUTATIONS,
    *engine_files.MUTATIONS,
    *engine_selection.MUTATIONS,
    *evaluation.MUTATIONS,
    *evaluation_attacks.MUTATIONS,
    *models.MUTATIONS,
    *networks.MUTATIONS,
    *data.MUTATIONS,
    *observe.MUTATIONS,
    *objectives.MUTATIONS,
    *meaning.MUTATIONS,
    *cores.MUTATIONS,
    *whole_runs.MUTATIONS,
    *words.MUTATIONS,
    *world.MUTATIONS,
)
