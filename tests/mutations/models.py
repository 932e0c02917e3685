"""Faults planted in models/."""

from tests.mutations.mutation import Mutation

_WEIGHTS = "tests/unit/test_models_weights.py::"
_NORM = "tests/unit/test_norm.py::"
_STATISTICS = "tests/unit/test_models_statistics.py::"
_REFERENCES = "tests/unit/test_models_references.py::"
_RANKS = "tests/distributed/test_norm_sync.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "the first stage halves the image too",
        "models/base.py",
        "2 if stage > 0 and index == 0 else 1",
        "2 if index == 0 else 1",
        _WEIGHTS + "test_same_weights_give_identical_logits[resnet18]",
    ),
    Mutation(
        "pixels are divided before the mean is taken off",
        "models/base.py",
        "(x - self.mean) / self.std",
        "x / self.std - self.mean",
        "tests/unit/test_models.py::test_pixel_normalisation_is_part_of_the_model",
    ),
    Mutation(
        "recomputed activations move the running statistics again",
        "models/base.py",
        "return nullcontext(), recomputation(block)",
        "return nullcontext(), nullcontext()",
        "tests/unit/test_models.py::test_activation_checkpointing_changes_nothing_but_memory",
    ),
    Mutation(
        "a short last group counts as a whole one",
        "models/norm.py",
        "share = group.shape[0] / x.shape[0]",
        "share = group_size / x.shape[0]",
        _NORM + "test_groups_equal_separate_forwards_and_the_mean_of_their_updates",
    ),
    Mutation(
        "the recipe's BN momentum is forgotten",
        "models/norm.py",
        "layer(channels, eps=config.bn_eps, momentum=config.bn_momentum)",
        "layer(channels, eps=config.bn_eps)",
        _REFERENCES + "test_norm_layers_take_eps_and_momentum_from_the_recipe",
    ),
    Mutation(
        "group norm forgets the recipe's eps",
        "models/norm.py",
        "GroupNorm(config.groups, channels, eps=config.bn_eps)",
        "GroupNorm(config.groups, channels)",
        _REFERENCES + "test_norm_layers_take_eps_and_momentum_from_the_recipe",
    ),
    Mutation(
        "a frozen norm normalises by the batch",
        "models/norm.py",
        "self.bias, False, 0.0, self.eps)",
        "self.bias, True, 0.0, self.eps)",
        _NORM + "test_train_and_eval_equal_torch_batch_norm_bitwise",
    ),
    Mutation(
        "the synchronised running variance is the biased one",
        "models/norm_sync.py",
        "unbiased = var * (total / (total - 1).clamp_min(1.0))",
        "unbiased = var",
        _RANKS + "test_two_ranks_equal_one_process_on_the_union",
    ),
    Mutation(
        "ranks' means count alike whatever their samples",
        "models/norm_sync.py",
        "mean = (counts * means).sum(0) / total",
        "mean = means.mean(0)",
        _RANKS + "test_two_ranks_equal_one_process_on_the_union",
    ),
    Mutation(
        "the gradient through shared statistics stays on its rank",
        "models/norm_sync.py",
        "sums = _SumOverRanks.apply(torch.cat([grad_bias, grad_weight]), ctx.group) / total",
        "sums = torch.cat([grad_bias, grad_weight]) / total",
        _RANKS + "test_two_ranks_equal_one_process_on_the_union",
    ),
    Mutation(
        "the classifier's kernel is no kernel to weight decay",
        "models/parameters.py",
        "isinstance(layer, nn.Conv2d | nn.Linear)}",
        "isinstance(layer, nn.Conv2d)}",
        _WEIGHTS + "test_weight_decay_rules_pick_what_they_say",
    ),
    Mutation(
        "biases decay though the rule leaves them out",
        "models/parameters.py",
        'id(parameter) not in of_norms and name.rsplit(".", 1)[-1] != "bias"',
        "id(parameter) not in of_norms",
        _WEIGHTS + "test_weight_decay_rules_pick_what_they_say",
    ),
    Mutation(
        "the truncated normal is not widened again",
        "models/initialise.py",
        "math.sqrt(2.0 / _fan_out(layer)) / TRUNCATED_STD",
        "math.sqrt(2.0 / _fan_out(layer))",
        _WEIGHTS + "test_initial_kernels_have_variance_two_over_fan_out[xie]",
    ),
    Mutation(
        "kernels start by what comes in",
        "models/initialise.py",
        "* conv.out_channels",
        "* conv.in_channels",
        _WEIGHTS + "test_initial_kernels_have_variance_two_over_fan_out",
    ),
    Mutation(
        "a bottleneck strides on its first convolution",
        "models/resnet.py",
        "        self.conv1 = conv1x1(in_channels, width)\n        self.bn1 = norm(width)\n        self.conv2 = conv3x3(width, width, stride)",
        "        self.conv1 = conv1x1(in_channels, width, stride)\n        self.bn1 = norm(width)\n        self.conv2 = conv3x3(width, width)",
        _WEIGHTS + "test_same_weights_give_identical_logits[resnet50]",
    ),
    Mutation(
        "a basic block activates before it adds",
        "models/resnet.py",
        "out = self.bn2(self.conv2(out))\n",
        "out = self.activation(self.bn2(self.conv2(out)))\n",
        _WEIGHTS + "test_same_weights_give_identical_logits[resnet18]",
    ),
    Mutation(
        "a pre-activation bottleneck strides on its first convolution",
        "models/preact_resnet.py",
        "        self.conv1 = conv1x1(in_channels, width)\n        self.bn2 = norm(width)\n        self.conv2 = conv3x3(width, width, stride)",
        "        self.conv1 = conv1x1(in_channels, width, stride)\n        self.bn2 = norm(width)\n        self.conv2 = conv3x3(width, width)",
        _REFERENCES + "test_preactivation_networks_compute_what_their_paper_defines",
    ),
    Mutation(
        "the last activation of a pre-activation net is missing",
        "models/preact_resnet.py",
        "pooled(self.activation(self.bn(x)))",
        "pooled(self.bn(x))",
        _REFERENCES + "test_preactivation_networks_compute_what_their_paper_defines",
    ),
    Mutation(
        "a wide net halves the image a stage late",
        "models/wide_resnet.py",
        "STAGE_STRIDES = (1, 2, 2)",
        "STAGE_STRIDES = (1, 1, 2)",
        _REFERENCES + "test_wide_networks_compute_what_their_paper_defines",
    ),
    Mutation(
        "a wide net's projection takes the raw input",
        "models/wide_resnet.py",
        "self.convShortcut(out)",
        "self.convShortcut(x)",
        _REFERENCES + "test_wide_networks_compute_what_their_paper_defines",
    ),
    Mutation(
        "an attack's bytes are those of the whole batch",
        "models/statistics.py",
        "input_grad_bytes=input_grad_bytes // SAMPLES",
        "input_grad_bytes=input_grad_bytes",
        _REFERENCES + "test_bytes_of_an_attack_are_those_that_a_real_one_keeps_for_one_image",
    ),
    Mutation(
        "activations are those of the whole batch",
        "models/statistics.py",
        "activations=counter.activations // SAMPLES",
        "activations=counter.activations",
        _REFERENCES + "test_activations_are_those_of_one_image_counted_by_hand",
    ),
    Mutation(
        "the quick count of multiply-adds is that of the whole batch",
        "models/statistics.py",
        "    return counter.macs // SAMPLES",
        "    return counter.macs",
        _REFERENCES + "test_multiply_adds_are_half_the_flops_that_torch_counts",
    ),
    Mutation(
        "pre-activation ResNet-34 lacks a block",
        "models/registry.py",
        '"preact_resnet34": Layout("preact_resnet", (3, 4, 6, 3), "basic")',
        '"preact_resnet34": Layout("preact_resnet", (3, 4, 6, 2), "basic")',
        _STATISTICS + "test_cifar_networks_have_the_published_size",
    ),
    Mutation(
        "stages two and three of ResNet-518 are swapped",
        "models/registry.py",
        "(3, 66, 100, 3)",
        "(3, 100, 66, 3)",
        _STATISTICS + "test_imagenet_networks_have_the_published_size_and_cost[resnet518]",
    ),
    Mutation(
        "leaky ReLU forgets the recipe's slope",
        "models/activations.py",
        "nn.LeakyReLU(config.leaky_slope)",
        "nn.LeakyReLU()",
        "tests/unit/test_models.py::test_activation_has_its_parameter",
    ),
)
