"""Faults in how networks that are not ours are taken in, and in dropout."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_UNIT = "tests/unit/test_foreign_networks.py::"
_TRAINED = "tests/integration/test_foreign_training.py::"

MUTATIONS = (
    Mutation(
        "a converted batch norm has a copy of the parameters",
        "models/convert.py",
        "ours.weight, ours.bias = layer.weight, layer.bias",
        "ours.weight, ours.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)",
        _UNIT + "test_conversion_takes_over_the_very_tensors",
    ),
    Mutation(
        "a converted batch norm has torch's eps whatever the network says",
        "models/convert.py",
        "ours = BatchNorm(0, eps=layer.eps, momentum=layer.momentum)",
        "ours = BatchNorm(0, momentum=layer.momentum)",
        _UNIT + "test_conversion_keeps_eps_and_momentum",
    ),
    Mutation(
        "the activation inside timm's batch norm is lost",
        "models/convert.py",
        "    if not behind:\n        return ours\n",
        "    return ours\n",
        _UNIT + "test_masks_of_timms_norm_layers_are_kept",
    ),
    Mutation(
        "both branches of a converted mixture share one layer",
        "models/convert.py",
        "mixture.clean, mixture.adv = copy.deepcopy(plain), plain",
        "mixture.clean, mixture.adv = plain, plain",
        _UNIT + "test_mixture_gives_each_branch_the_networks_own_statistics_to_begin_with",
    ),
    Mutation(
        "batch norm over vectors passes for one over images",
        "models/convert.py",
        "if not isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):",
        "if not isinstance(layer, _BatchNorm):",
        _UNIT + "test_batch_norm_that_cannot_be_taken_over_is_named",
    ),
    Mutation(
        "the twin of somebody's network folds nothing",
        "engine/twin/twin.py",
        'convert_batch_norms(aliased_copy(module), strict=bn_mode != "eval")',
        "aliased_copy(module)",
        _UNIT + "test_attack_on_a_raw_module_runs_in_every_mode_and_moves_statistics_in_one",
    ),
    Mutation(
        "a window's mask stays in float32 in a 16-bit twin",
        "engine/twin/folding.py",
        "        if dtype is not None and held.is_floating_point() and held.dtype != dtype:\n",
        "        if False:\n",
        _UNIT + "test_sixteen_bit_twin_runs_and_points_the_same_way",
    ),
    Mutation(
        "layer norms decay",
        "models/parameters.py",
        "_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)",
        "_OTHER_NORMS = (nn.GroupNorm, nn.RMSNorm, _NormBase)",
        _UNIT + "test_decay_reaches_kernels_and_no_norm",
    ),
    Mutation(
        "another network gets a batch norm where a plug-in's norm was asked for",
        "catalogue/norms.py",
        "        if self.take_over is None:\n            made = self.make(config, layer.num_features).to(layer.weight.device, layer.weight.dtype)\n",
        "        if self.take_over is None:\n            made = NORMS['gn'].instead_of(config, layer)\n",
        "tests/unit/test_norm_plugins.py::test_layer_of_the_plugin_stands_everywhere[instance-InstanceNorm2d-torchvision:resnet18]",
    ),
    Mutation(
        "norms of torch that a plug-in makes decay",
        "models/parameters.py",
        "nn.RMSNorm, _NormBase)",
        "nn.RMSNorm)",
        "tests/unit/test_norm_plugins.py::test_parameters_of_torch_s_norms_are_norms_to_weight_decay",
    ),
    Mutation(
        "a run begun from another does not bring its plug-ins",
        "recipes.py",
        '"plugins": _united(tree, held)',
        '"plugins": _united(tree, tree)',
        "tests/integration/test_plugins.py::test_run_that_begins_from_another_has_its_plugins",
    ),
    Mutation(
        "masks depend on the place in the batch",
        "models/dropout.py",
        "self.draw.epoch, self.draw.ids, count",
        "self.draw.epoch, torch.arange(images), count",
        _UNIT + "test_masks_belong_to_samples_whatever_the_batch_and_change_with_every_key",
    ),
    Mutation(
        "all layers drop by the same mask",
        "models/dropout.py",
        "draw = self.number * _FORWARDS + self.draw.forward",
        "draw = self.draw.forward",
        _UNIT + "test_masks_belong_to_samples_whatever_the_batch_and_change_with_every_key",
    ),
    Mutation(
        "what stays is not scaled up",
        "models/dropout.py",
        ".to(x.dtype) / (1.0 - self.p)",
        ".to(x.dtype)",
        _UNIT + "test_mask_is_one_number_an_element_a_channel_or_an_image",
    ),
    Mutation(
        "masks are those of the step before",
        "engine/trainer.py",
        "            p.engine.begin_batch(batch, self.config.seed)\n",
        "            p.engine._draw is None and p.engine.begin_batch(batch, self.config.seed)\n",
        _TRAINED + "test_network_trains_resumes_bitwise_and_is_evaluated[wide, dropout]",
    ),
    Mutation(
        "every tensor of another shape passes for the old head",
        "models/foreign.py",
        "if key in heads and key in own and",
        "if key in own and",
        _UNIT + "test_published_weights_are_loaded_strictly_but_for_a_new_head",
    ),
    Mutation(
        "a network from a file is not part of the run",
        "recipe_code.py",
        '    return Node({**tree.value, "plugins": Node([*listed, item], arch.source)}, tree.source)\n',
        "    return tree\n",
        _TRAINED + "test_network_of_a_file_beside_the_recipe_is_part_of_the_run",
    ),
    Mutation(
        "attention costs nothing",
        "models/statistics.py",
        "return self._flops.get_total_flops() // 2",
        'return sum(n for op, n in self._flops.get_flop_counts()["Global"].items() if "addmm" not in str(op)) // 2',
        _UNIT + "test_attention_is_counted_in_the_cost",
    ),
    Mutation(
        "another network inherits the layout of the one before",
        "recipes.py",
        "        tree = switch_network(tree, arch)\n",
        "",
        _TRAINED + "test_what_cannot_be_built_is_told_in_one_line[torchvision:resnet1-Did you mean 'resnet18'\\\\?]",
    ),
    Mutation(
        "a field that is added to the network's section makes every evaluation anew",
        "config/model.py",
        "return self.model_dump_json(exclude=silent)",
        "return self.model_dump_json()",
        "tests/integration/test_evaluate_run.py::test_description_of_a_network_never_changes_by_itself",
    ),
)
