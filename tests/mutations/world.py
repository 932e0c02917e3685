"""Faults planted in what ranks cost as they become many, and in what they tell each other."""

from tests.mutations.mutation import Mutation

_GROWTH = "tests/distributed/test_growth.py::"
_EXCHANGE = "tests/distributed/test_exchange.py::test_every_rank_gets_every_value_in_rank_order"
_RANKS = "tests/distributed/test_checkpoint_ranks.py::"
_CHECKPOINT = "tests/unit/test_checkpoint.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "objects come in another order on each rank",
        "exchange.py",
        "[held[(r - rank) % world_size] for r in range(world_size)]",
        "[held[r] for r in range(world_size)]",
        _EXCHANGE,
    ),
    Mutation(
        "the last round of an exchange takes too few",
        "exchange.py",
        "count = min(distance, world_size - distance)",
        "count = 1",
        _EXCHANGE,
    ),
    Mutation(
        "the rest of a long message is not waited for",
        "exchange.py",
        "_swap(own[_FIRST_BYTES:], rest, to, source, group)",
        "_swap(own[_FIRST_BYTES:], rest[:0], to, source, group)",
        _EXCHANGE,
    ),
    Mutation(
        "every pair of ranks is connected in every group",
        "engine/processes/world.py",
        '"TORCH_GLOO_LAZY_INIT", "1"',
        '"TORCH_GLOO_LAZY_INIT", "0"',
        _GROWTH + "test_sockets_grow_with_the_logarithm",
    ),
    Mutation(
        "a log row's times go round a ring",
        "engine/processes/world.py",
        "return [value] if world.world_size == 1 else gather_objects(value, world.control)",
        "out = [None] * world.world_size\n    for _ in range(3):\n"
        "        dist.all_gather_object(out, value, group=world.control)\n    return out",
        _GROWTH + "test_messages_grow_by_gloos_rings_alone",
    ),
    Mutation(
        "every rank checks every file",
        "engine/checkpoint/files.py",
        "sorted(manifest.files)[rank::world_size]",
        "sorted(manifest.files)",
        _GROWTH + "test_no_rank_opens_or_lists_more_in_a_larger_world",
    ),
    Mutation(
        "some files are checked by no rank",
        "engine/checkpoint/files.py",
        "sorted(manifest.files)[rank::world_size]",
        "sorted(manifest.files)[rank::4]",
        _RANKS + "test_refusals_are_the_same_on_all_ranks_and_a_damaged_newest_one_is_skipped_by_all",
    ),
    Mutation(
        "what is read in shares is not brought together",
        "engine/checkpoint/manager.py",
        "        if ranks.world_size > 1:\n            complete(",
        "        if ranks.world_size > 9:\n            complete(",
        _RANKS + "test_what_all_ranks_hold_alike_is_read_in_shares_and_whole_on_each",
    ),
    Mutation(
        "a piece is put at the tensor's beginning",
        "engine/checkpoint/shards.py",
        "begin = piece.start * width",
        "begin = 0",
        _RANKS + "test_what_all_ranks_hold_alike_is_read_in_shares_and_whole_on_each",
    ),
    Mutation(
        "contents that cannot be loaded end the run",
        "engine/checkpoint/manager.py",
        "            except UnreadableCheckpoint:",
        "            except NotImplementedError:",
        _CHECKPOINT + "test_contents_that_cannot_be_loaded_give_way_to_the_checkpoint_before",
    ),
    Mutation(
        "another network's checkpoint gives way to an older one",
        "engine/checkpoint/manager.py",
        "            except UnreadableCheckpoint:",
        "            except CheckpointError:\n                self._unreadable[path] = BadCheckpoint('other')",
        _CHECKPOINT + "test_a_checkpoint_of_another_network_gives_way_to_none",
    ),
    Mutation(
        "every rank of a node tries the disk",
        "engine/checkpoint/examination.py",
        "elif hosts.index(hosts[ranks.rank]) == ranks.rank:",
        "else:",
        _GROWTH + "test_no_rank_opens_or_lists_more_in_a_larger_world",
    ),
    Mutation(
        "every rank reads every ledger",
        "evaluation/runner.py",
        "reads = ledger if shard.rank == 0 or not shard.connected else None",
        "reads = ledger",
        "tests/distributed/test_evaluation_sharded.py::"
        "test_a_failure_on_one_rank_ends_all_and_another_world_size_resumes",
    ),
    Mutation(
        "rank 0 is asked for as few open files as the others",
        "engine/processes/open_files.py",
        "first = _OF_FIRST * (world_size - 1) if rank == 0 else 1",
        "first = 1",
        "tests/distributed/test_open_files.py::test_rank_0_alone_needs_more_with_every_rank",
    ),
    Mutation(
        "a rank killed in set-up makes the run one that has saved itself",
        "engine/processes/launch.py",
        "if first_failure != EXIT_REQUEUE:",
        "if first_failure is None:",
        "tests/unit/test_launch.py::test_the_code_of_several_failing_ranks_is_the_one_that_explains_most",
    ),
    Mutation(
        "a node that is behind sets a checkpoint aside for all",
        "engine/checkpoint/examination.py",
        "certain = ranks.broadcast(ranks.is_first and _certainly_bad(folder))",
        "certain = True",
        _RANKS + "test_a_node_that_is_behind_sets_no_good_checkpoint_aside",
    ),
    Mutation(
        "a disk that refuses once makes a checkpoint unreadable",
        "engine/checkpoint/ranks.py",
        "return isinstance(error, (OSError, MemoryError)) or",
        "return",
        _CHECKPOINT + "test_disk_or_memory_that_refuses_while_a_checkpoint_is_read_is_told_and_no_older_one_taken",
    ),
    Mutation(
        "connections are first made when a rank may be gone",
        "engine/checkpoint/ranks.py",
        "            connect(self.group)\n            self._connect_to_first()\n",
        "            pass\n",
        "tests/distributed/test_exchange.py::test_a_rank_lost_before_the_first_save_is_noticed_at_once",
    ),
)
