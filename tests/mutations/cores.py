"""Faults planted in how many cores a rank takes for its own."""

from tests.mutations.mutation import Mutation

_CORES = "tests/unit/test_cores.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "a rank takes the whole machine",
        "cores.py",
        "process=os.getppid()) // ranks",
        "process=os.getppid()) // 1",
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "ranks of DeepSpeed's launcher are not counted",
        "cores.py",
        ' or _number(environ.get("LOCAL_SIZE"))',
        "",
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "ranks that their launcher bound divide their cores once more",
        "cores.py",
        "process=os.getppid()",
        "process=0",
        _CORES + "test_ranks_that_their_launcher_bound_do_not_divide_again",
    ),
    Mutation(
        "a task that srun has bound divides its cores once more, and a batch script takes the machine",
        "cores.py",
        '_number(environ.get("SLURM_CPUS_ON_NODE")) or affinity',
        "affinity",
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "SLURM's cores a task are not read",
        "cores.py",
        "pool = per_task * tasks",
        "pass",
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "srun's tasks are taken for launchers where a script exports torchrun's variables",
        "cores.py",
        'environ.get("WORLD_SIZE", "") == environ.get("SLURM_STEP_NUM_TASKS")',
        'environ.get("WORLD_SIZE", "") == "no"',
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "every node has as many tasks as the first",
        "cores.py",
        'here = _number(environ.get("SLURM_NODEID")) or 0',
        "here = 0",
        _CORES + "test_share_of_a_rank",
    ),
    Mutation(
        "a container's quota is not read",
        "cores.py",
        "pool = min(pool, cpu_quota(root) or pool)",
        "pass",
        _CORES + "test_ranks_of_a_container_share_its_quota",
    ),
    Mutation(
        "a quota above the own control group is not seen",
        "cores.py",
        "(folder, *folder.parents)",
        "(folder,)",
        _CORES + "test_quota_of_the_control_group_and_those_above_it",
    ),
    Mutation(
        "a controller mounted under another order of its names is not found",
        "cores.py",
        '{controllers, "cpu"}',
        "{controllers}",
        _CORES + "test_quota_of_the_control_group_and_those_above_it",
    ),
    Mutation(
        "our workers are not told how many share the machine",
        "engine/processes/launch.py",
        "        LOCAL_WORLD_SIZE=str(workers),\n",
        "",
        _CORES + "test_two_self_launched_workers_see_half_of_the_allowed_cores_each",
    ),
    Mutation(
        "each of our workers computes with all allowed cores",
        "engine/processes/launch.py",
        "allowed_cores(env) // workers",
        "allowed_cores(env)",
        _CORES + "test_two_self_launched_workers_see_half_of_the_allowed_cores_each",
    ),
    Mutation(
        "our launcher divides its shell's cores, not its own",
        "engine/processes/launch.py",
        "allowed_cores(env) // workers",
        "allowed_cores(env, process=os.getppid()) // workers",
        _CORES + "test_launcher_divides_its_own_cores_not_those_of_the_shell_around_it",
    ),
    Mutation(
        "ranks without OMP_NUM_THREADS compute with all cores",
        "engine/processes/world.py",
        "torch.set_num_threads(min(torch.get_num_threads(), core_share()))",
        "pass",
        _CORES + "test_ranks_whose_launcher_sets_no_threads_compute_with_their_share[told0-3]",
    ),
    Mutation(
        "threads that the user set are lowered",
        "engine/processes/world.py",
        'if "OMP_NUM_THREADS" not in os.environ:',
        "if True:",
        _CORES + "test_ranks_whose_launcher_sets_no_threads_compute_with_their_share[told1-12]",
    ),
    Mutation(
        "the decoder is chosen by the machine's cores",
        "data/sources.py",
        "few = decoder_threads(config.num_threads) <",
        "few = 16 <",
        _CORES + "test_backend_is_chosen_by_the_share",
    ),
    Mutation(
        "a bound rank takes more than its cores",
        "cores.py",
        "min(_affinity(0), allowed_cores(environ, root=root, process=os.getppid()) // ranks)",
        "allowed_cores(environ, root=root, process=os.getppid()) // ranks",
        _CORES + "test_ranks_that_their_launcher_bound_do_not_divide_again",
    ),
)
