"""Faults planted in what an evaluation attacks with: protocols, PGD, AutoAttack, and what each did to a batch."""

from tests.mutations.mutation import Mutation

_PGD = "tests/strangers/test_pgd.py::"
_ROW = _PGD + "test_each_row_is_that_of_a_pgd_written_by_hand"
_OUTCOME = "tests/unit/test_evaluation_plain.py::test_an_outcome_keeps_what_broke_a_sample_first_and_the_highest_loss_where_nothing_did"
_AUTO = "tests/strangers/test_autoattack.py::"
_VERSION = _AUTO + "test_each_version_is_plain_pyautoattack"
_ALONE = _AUTO + "test_each_attack_alone_is_that_of_plain_pyautoattack"

PROTOCOL = (
    Mutation(
        "AutoAttack's targeted APGD gives way to the untargeted one",
        "evaluation/kinds/autoattack.py",
        '_STANDARD = ("apgd-ce", "apgd-t",',
        '_STANDARD = ("apgd-ce", "apgd-dlr",',
        _VERSION + "[standard-trained]",
    ),
    Mutation(
        "the version for random networks averages half of its gradients",
        "evaluation/kinds/autoattack.py",
        '"eot_steps": 20 if entry.version == "rand"',
        '"eot_steps": 10 if entry.version == "rand"',
        _VERSION + "[rand-untrained]",
    ),
    Mutation(
        "the long version of AutoAttack restarts once",
        "evaluation/kinds/autoattack.py",
        '"restarts": 5 if entry.version == "plus"',
        '"restarts": 5 if entry.version == "standard"',
        _VERSION + "[plus-untrained]",
    ),
    Mutation(
        "with few classes one of them is aimed at twice",
        "evaluation/kinds/autoattack.py",
        "min(9, num_classes - 1)",
        "min(9, num_classes)",
        _AUTO + "test_few_classes_are_all_aimed_at",
    ),
    Mutation(
        "with three classes a loss that needs four is used",
        "evaluation/kinds/autoattack.py",
        'if num_classes < 4 and "apgd-t" in attacks',
        'if num_classes < 3 and "apgd-t" in attacks',
        _AUTO + "test_few_classes_are_all_aimed_at",
    ),
    Mutation(
        "AutoAttack makes a fifth of its steps unless told",
        "evaluation/kinds/autoattack.py",
        "NUM_STEPS, NUM_QUERIES = 100, ",
        "NUM_STEPS, NUM_QUERIES = 20, ",
        _AUTO + "test_budgets_that_nobody_named_are_the_published_ones",
    ),
    Mutation(
        "Square asks a tenth of its queries unless told",
        "evaluation/kinds/autoattack.py",
        "NUM_STEPS, NUM_QUERIES = 100, 5000",
        "NUM_STEPS, NUM_QUERIES = 100, 500",
        _AUTO + "test_budgets_that_nobody_named_are_the_published_ones",
    ),
    Mutation(
        "targeted attacks leave out what is wrong without an attack",
        "evaluation/kinds/pgd.py",
        '"all" if ATTACK_TARGETS[attack.target].targeted else "clean_correct"',
        '"clean_correct"',
        _ROW + "[linf, random other target-trained]",
    ),
    Mutation(
        "a recipe's restarts are not made",
        "evaluation/kinds/pgd.py",
        '"restarts": attack.restarts,',
        '"restarts": 1,',
        _ROW + "[linf, four restarts-untrained]",
    ),
    Mutation(
        "the step rule of a recipe is not applied",
        "evaluation/kinds/pgd.py",
        '"step_size": attack.effective_step_size,\n            "num',
        '"step_size": attack.step_size,\n            "num',
        _PGD + "test_step_rule_of_xie_and_yuille_lengthens_short_steps_and_leaves_long_ones",
    ),
    Mutation(
        "the width of a Gaussian start is that of TRADES whatever the recipe says",
        "evaluation/kinds/pgd.py",
        '"start_std": attack.start_std if ATTACK_STARTS[attack.start].spread else 0.0',
        '"start_std": attack.start_std if not ATTACK_STARTS[attack.start].spread else 0.0',
        _ROW + "[linf from Gaussian noise that is not clipped-trained]",
    ),
    Mutation(
        "starts are clipped to the box whatever the recipe says",
        "evaluation/kinds/pgd.py",
        '            "clip_start": attack.clip_start,\n',
        "",
        _ROW + "[linf, start not clipped-trained]",
    ),
    Mutation(
        "no image starts at the clean one whatever the recipe says",
        "evaluation/kinds/pgd.py",
        '"start_clean_probability": attack.start_clean_probability',
        '"start_clean_probability": 0.0',
        _ROW + "[linf, a third of the images from the clean one-untrained]",
    ),
    Mutation(
        "evaluations ignore the run's seed",
        "evaluation/protocol.py",
        '"eps": attack.eps, "seed": seed}',
        '"eps": attack.eps, "seed": 0}',
        _ROW + "[linf-trained]",
    ),
)

ATTACKS = (
    Mutation(
        "every restart begins where the first did",
        "evaluation/kinds/pgd.py",
        "first_draw=restart,",
        "first_draw=0,",
        _ROW + "[linf, four restarts-trained]",
    ),
    Mutation(
        "an evaluation repeats the starts of training's first epoch",
        "evaluation/kinds/pgd.py",
        '"epoch": EVALUATION_EPOCH',
        '"epoch": 0',
        _ROW + "[linf-untrained]",
    ),
    Mutation(
        "verdicts at fewer steps are booked on the longest attack",
        "evaluation/kinds/pgd.py",
        "found = fewer.get(count, outcome)",
        "found = outcome",
        _PGD + "test_each_number_of_steps_of_one_pass_is_that_of_a_pgd_written_by_hand",
    ),
    Mutation(
        "images on the way are kept a step too early",
        "evaluation/kinds/pgd.py",
        "if done in counts:",
        "if done + 1 in counts:",
        _PGD + "test_each_number_of_steps_of_one_pass_is_that_of_a_pgd_written_by_hand",
    ),
    Mutation(
        "targeted restarts spare broken images, whose targets they might reach",
        "evaluation/kinds/pgd.py",
        "left = torch.arange(len(y), device=y.device) if targeted else torch.nonzero(~outcome.broken).squeeze(1)",
        "left = torch.nonzero(~outcome.broken).squeeze(1)",
        _ROW + "[linf, random other target-trained]",
    ),
    Mutation(
        "every PGD ascends the cross-entropy",
        "evaluation/kinds/pgd.py",
        '"loss": protocol.loss',
        '"loss": "ce"',
        _ROW + "[linf, margin-trained]",
    ),
    Mutation(
        "AutoAttack's radius is divided by 256",
        "evaluation/kinds/autoattack.py",
        "eps=protocol.eps / 255,\n        norm=",
        "eps=protocol.eps / 256,\n        norm=",
        _ALONE + "[apgd-ce]",
    ),
    Mutation(
        "FAB makes a fifth of its steps",
        "evaluation/kinds/autoattack.py",
        "tools.fab.n_iter = protocol.num_steps",
        "tools.fab.n_iter = max(1, protocol.num_steps // 5)",
        _ALONE + "[fab-t]",
    ),
    Mutation(
        "APGD looks at its progress too late",
        "evaluation/kinds/autoattack.py",
        "max(int(0.22 * protocol.num_steps), 1)",
        "max(int(0.42 * protocol.num_steps), 1)",
        _ALONE + "[apgd-dlr]",
    ),
    Mutation(
        "under the name of the targeted APGD the untargeted one runs",
        "evaluation/kinds/autoattack.py",
        "return tools.apgd_targeted.perturb(x, y)",
        "return tools.apgd.perturb(x, y)",
        _VERSION + "[fast-trained]",
    ),
    Mutation(
        "APGD keeps the cross-entropy for every name",
        "evaluation/kinds/autoattack.py",
        'tools.apgd.loss = name.removeprefix("apgd-")',
        'tools.apgd.loss = "ce"',
        _VERSION + "[rand-trained]",
    ),
    Mutation(
        "the targeted FAB restarts as often as the untargeted one",
        "evaluation/kinds/autoattack.py",
        'tools.fab.n_restarts = 1 if name == "fab-t" else restarts',
        "tools.fab.n_restarts = restarts",
        _VERSION + "[plus-untrained]",
    ),
    Mutation(
        "chunks of all seeds draw the same noise",
        "evaluation/kinds/autoattack.py",
        "chunk_seed(protocol.seed, chunk_ids)",
        "chunk_seed(0, chunk_ids)",
        _ALONE + "[apgd-t]",
    ),
    Mutation(
        "each attack of AutoAttack runs on broken images too",
        "evaluation/kinds/autoattack.py",
        "left = torch.nonzero(~outcome.broken).squeeze(1)",
        "left = torch.arange(len(y))",
        _VERSION + "[standard-untrained]",
    ),
    Mutation(
        "what any attack of AutoAttack broke is said of the first",
        "evaluation/kinds/autoattack.py",
        'reduction="none"), y[left], number)',
        'reduction="none"), y[left], 0)',
        _VERSION + "[fast-trained]",
    ),
    Mutation(
        "the loss of a broken image is that of an earlier one that it withstood",
        "evaluation/attacked.py",
        "fresh & (wrong | (loss.double() > self.loss[index]))",
        "fresh & (loss.double() > self.loss[index])",
        _OUTCOME,
    ),
    Mutation(
        "the prediction of a broken image is that of the last restart",
        "evaluation/attacked.py",
        "self.prediction[index[fresh]] = predicted[fresh]",
        "self.prediction[index] = predicted",
        _OUTCOME,
    ),
    Mutation(
        "only the last restart's hits of a target count",
        "evaluation/attacked.py",
        "self.target_hit[index] |= predicted == targets",
        "self.target_hit[index] = predicted == targets",
        _ROW + "[linf, random other target-trained]",
    ),
    Mutation(
        "an attack's rounding errors stay outside the ball",
        "evaluation/attacked.py",
        "return Threat(norm, eps).project(adv, x)",
        "return adv",
        _VERSION + "[standard-trained]",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*PROTOCOL, *ATTACKS)
